#include "scratch.h"

#include <stdint.h>
#include <stdlib.h>

static const size_t MOST_KEPT_BYTES = 1 << 20; /* of each buffer; ImageNet's images need less */

#ifdef __SANITIZE_ADDRESS__
enum { KEEPS = 0 }; /* so that every buffer ends where it is said to */
#else
enum { KEEPS = 1 };
#endif

void *scratch_take(Scratch *scratch, int buffer, size_t bytes)
{
    if (!KEEPS || scratch->bytes[buffer] < bytes || scratch->buffers[buffer] == NULL) {
        free(scratch->buffers[buffer]);
        scratch->buffers[buffer] = malloc(bytes > 0 ? bytes : 1);
        scratch->bytes[buffer] = scratch->buffers[buffer] == NULL ? 0 : bytes;
    }
    return scratch->buffers[buffer];
}

void scratch_trim(Scratch *scratch)
{
    for (int k = 0; k < NUM_BUFFERS; k++)
        if (scratch->bytes[k] > MOST_KEPT_BYTES) {
            free(scratch->buffers[k]);
            scratch->buffers[k] = NULL;
            scratch->bytes[k] = 0;
        }
}

void scratch_free(Scratch *scratch)
{
    for (int k = 0; k < NUM_BUFFERS; k++)
        free(scratch->buffers[k]);
    free(scratch->huffman);
    free(scratch);
}
