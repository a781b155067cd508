/* A libnvidia-ml.so.1 with FAKE_GPUS H100s (2 if not set), driver FAKE_DRIVER, whose function FAKE_HANGING never returns.
   The second GPU is ill, and does not tell its power. Enough for nvidia-ml-py and for Ray to talk to; they take every function that is not here as not supported. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int gpu, memory; } use_t;
enum { NOT_SUPPORTED = 3, INVALID_ARGUMENT = 2, NUM_NVLINKS = 18 };
static char gpus[64];

static unsigned int num_gpus(void) { return getenv("FAKE_GPUS") ? atoi(getenv("FAKE_GPUS")) : 2; }
static int is_ill(void *device) { return (char *)device == gpus + 1; }

static void hang_if_asked(const char *function) {
    while (getenv("FAKE_HANGING") && !strcmp(getenv("FAKE_HANGING"), function)) sleep(1000);
}

int nvmlInitWithFlags(unsigned int flags) { hang_if_asked(__func__); return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = num_gpus(); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int k, void **device) { *device = gpus + k; return k < num_gpus() ? 0 : INVALID_ARGUMENT; }
const char *nvmlErrorString(int code) { return "not supported"; }

int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    snprintf(version, length, "%s", getenv("FAKE_DRIVER") ? getenv("FAKE_DRIVER") : "580.65.06");
    return 0;
}

int nvmlDeviceGetName(void *device, char *name, unsigned int length) {
    snprintf(name, length, "NVIDIA H100 80GB HBM3");
    return 0;
}

int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }

int nvmlDeviceGetNvLinkState(void *device, unsigned int link, unsigned int *active) {
    *active = !is_ill(device) || link < 16;
    return link < NUM_NVLINKS ? 0 : INVALID_ARGUMENT;
}

int nvmlDeviceGetMaxPcieLinkGeneration(void *device, unsigned int *generation) { *generation = 5; return 0; }
int nvmlDeviceGetMaxPcieLinkWidth(void *device, unsigned int *lanes) { *lanes = 16; return 0; }
int nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned int *lanes) { *lanes = is_ill(device) ? 8 : 16; return 0; }

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned int *celsius) { *celsius = is_ill(device) ? 91 : 40; return 0; }
int nvmlDeviceGetTemperatureThreshold(void *device, int kind, unsigned int *celsius) { *celsius = 90; return 0; }

int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
    *reasons = is_ill(device) ? 0x08 | 0x40 : 0x01; /* hardware and its temperature; idle */
    return 0;
}

int nvmlDeviceGetTotalEccErrors(void *device, int type, int counter, unsigned long long *count) {
    *count = is_ill(device) ? 3 : 0;
    return 0;
}

int nvmlDeviceGetRemappedRows(void *device, unsigned int *correctable, unsigned int *other, unsigned int *pending, unsigned int *failed) {
    *correctable = *other = *failed = 0;
    *pending = is_ill(device);
    return 0;
}

int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    memory->total = 80000000000ull;
    memory->used = 20000000000ull;
    memory->free = 60000000000ull;
    return 0;
}

int nvmlDeviceGetUtilizationRates(void *device, use_t *use) {
    hang_if_asked(__func__);
    use->gpu = (char *)device == gpus ? 97 : 3;
    use->memory = 55;
    return 0;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned int *milliwatts) {
    *milliwatts = 350000;
    return is_ill(device) ? NOT_SUPPORTED : 0;
}

int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned int *milliwatts) { *milliwatts = 700000; return 0; }
