/* A libnvidia-ml.so.1 with two GPUs; the second does not tell its power. Enough for nvidia-ml-py to talk to. */
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int gpu, memory; } use_t;
static char gpus[2];

/* Compiled with -DHANGING_<function>, that function never returns. */
#include <unistd.h>
#ifndef HANGING_nvmlInitWithFlags
#define HANGING_nvmlInitWithFlags 0
#endif
#ifndef HANGING_nvmlDeviceGetUtilizationRates
#define HANGING_nvmlDeviceGetUtilizationRates 0
#endif
static void hang_if(int hangs) { while (hangs) sleep(1000); }

int nvmlInitWithFlags(unsigned int flags) { hang_if(HANGING_nvmlInitWithFlags); return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int k, void **device) { *device = gpus + k; return k < 2 ? 0 : 2; }
const char *nvmlErrorString(int code) { return "not supported"; }

int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    memory->total = 80000000000ull;
    memory->used = 20000000000ull;
    memory->free = 60000000000ull;
    return 0;
}

int nvmlDeviceGetUtilizationRates(void *device, use_t *use) {
    hang_if(HANGING_nvmlDeviceGetUtilizationRates);
    use->gpu = (char *)device == gpus ? 97 : 3;
    use->memory = 55;
    return 0;
}

int nvmlDeviceGetPowerUsage(void *device, unsigned int *milliwatts) {
    *milliwatts = 350000;
    return (char *)device == gpus ? 0 : 3;
}

int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned int *milliwatts) { *milliwatts = 700000; return 0; }
