/* Reads recorded files below one folder, whole or their ends, many in one call and without Python's lock: from the page
 * cache the ends of a file take 6 microseconds, of which Python would add 10.
 *
 * The answer goes one way. A file that cannot be read, or is not as it was recorded, is only left out; whoever asks reads
 * it in Python, which tells what is wrong. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    const char *root;         /* absolute */
    const char *names;        /* of all files, one after another, without zeros */
    const int64_t *name_ends; /* where each ends in `names` */
    const int64_t *sizes, *stamps_ns;
} Listing;

static int path_of(const Listing *listing, int64_t index, char *path)
{
    int64_t start = index ? listing->name_ends[index - 1] : 0;
    size_t length = (size_t)(listing->name_ends[index] - start), root_length = strlen(listing->root);
    if (root_length + length + 2 > PATH_MAX)
        return 0;
    memcpy(path, listing->root, root_length);
    path[root_length] = '/';
    memcpy(path + root_length + 1, listing->names + start, length);
    path[root_length + 1 + length] = 0;
    return strlen(path) == root_length + 1 + length;
}

static int read_at(int file, uint8_t *into, int64_t count, int64_t offset)
{
    while (count > 0) {
        ssize_t got = pread(file, into, (size_t)count, offset);
        if (got == 0 || (got < 0 && errno != EINTR))
            return 0;
        if (got > 0)
            into += got, count -= got, offset += got;
    }
    return 1;
}

static int read_ends(int file, int64_t size, int64_t head, int64_t tail, uint8_t *into)
{
    head = size < head ? size : head;
    tail = size - head < tail ? size - head : tail;
    return read_at(file, into, head, 0) && read_at(file, into + head, tail, size - tail);
}

/* The first `head` bytes of each file, or all there are, and at once behind them the last `tail` bytes of what is left,
 * to `into`, a row of `stride` bytes for each. Tells in `num_bytes` how many the whole file has, or -1. */
__attribute__((visibility("default"))) void data_prep_read_files(const Listing *listing, const int64_t *indices,
                                                                 int64_t count, int64_t head, int64_t tail,
                                                                 uint8_t *into, int64_t stride, int64_t *num_bytes)
{
    char path[PATH_MAX];
    for (int64_t k = 0; k < count; k++) {
        int64_t index = indices[k], size = listing->sizes[index];
        num_bytes[k] = -1;
        if (!path_of(listing, index, path))
            continue;
        int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not hold us up */
        if (file < 0)
            continue;
        struct stat status;
        if (fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size == size &&
            status.st_mtim.tv_sec * INT64_C(1000000000) + status.st_mtim.tv_nsec == listing->stamps_ns[index] &&
            read_ends(file, size, head, tail, into + k * stride))
            num_bytes[k] = size;
        close(file);
    }
}
