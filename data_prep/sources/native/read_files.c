/* Files below one folder, many in one call and without Python's lock: their status, and once that is recorded, their ends
 * or the whole. From the page cache the ends of a file take 7 microseconds; Python would add 10.
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

enum { NO_FILE = -1, UNKNOWN = -2 };

static int64_t stamp_of(const struct stat *status)
{
    return status->st_mtim.tv_sec * INT64_C(1000000000) + status->st_mtim.tv_nsec;
}

/* Size and time of change in ns of the first `count` files of the listing, through links. Where there is none, or it is no
 * file, 0 and NO_FILE; where that cannot be told, 0 and UNKNOWN. */
__attribute__((visibility("default"))) void data_prep_stat_files(const Listing *listing, int64_t count, int64_t *sizes,
                                                                 int64_t *stamps_ns)
{
    char path[PATH_MAX];
    struct stat status;
    for (int64_t k = 0; k < count; k++) {
        sizes[k] = 0;
        stamps_ns[k] = UNKNOWN;
        if (!path_of(listing, k, path))
            continue;
        if (stat(path, &status)) {
            if (errno == ENOENT)
                stamps_ns[k] = NO_FILE;
        } else if (!S_ISREG(status.st_mode))
            stamps_ns[k] = NO_FILE;
        else {
            sizes[k] = status.st_size;
            stamps_ns[k] = stamp_of(&status);
        }
    }
}

/* Opens a file that is still as it was recorded; -1. */
static int open_recorded(const Listing *listing, int64_t index)
{
    char path[PATH_MAX];
    if (listing->stamps_ns[index] < 0 || !path_of(listing, index, path)) /* below zero: no file, or of before 1970 */
        return -1;
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not hold us up */
    struct stat status;
    if (file < 0 || (fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size == listing->sizes[index] &&
                     stamp_of(&status) == listing->stamps_ns[index]))
        return file;
    close(file);
    return -1;
}

/* The first `head` bytes of each file, or all there are, and at once behind them the last `tail` bytes of what is left,
 * to `into`, a row of `stride` bytes for each. Tells in `num_bytes` how many the whole file has, or -1. */
__attribute__((visibility("default"))) void data_prep_read_ends(const Listing *listing, const int64_t *indices,
                                                                int64_t count, int64_t head, int64_t tail, uint8_t *into,
                                                                int64_t stride, int64_t *num_bytes)
{
    for (int64_t k = 0; k < count; k++, into += stride) {
        int64_t size = listing->sizes[indices[k]];
        int64_t first = size < head ? size : head, last = size - first < tail ? size - first : tail;
        int file = open_recorded(listing, indices[k]);
        int is_read = file >= 0 && read_at(file, into, first, 0) && read_at(file, into + first, last, size - last);
        num_bytes[k] = is_read ? size : -1;
        if (file >= 0)
            close(file);
    }
}

/* Whole files one behind the other, which must fill `into`, `num_bytes` long. Whether all of them were read. */
__attribute__((visibility("default"))) int data_prep_read_files(const Listing *listing, const int64_t *indices,
                                                                int64_t count, uint8_t *into, int64_t num_bytes)
{
    for (int64_t k = 0; k < count; k++) {
        int64_t size = listing->sizes[indices[k]];
        int file = size <= num_bytes ? open_recorded(listing, indices[k]) : -1;
        int is_read = file >= 0 && read_at(file, into, size, 0);
        if (file >= 0)
            close(file);
        if (!is_read)
            return 0;
        into += size;
        num_bytes -= size;
    }
    return num_bytes == 0;
}
