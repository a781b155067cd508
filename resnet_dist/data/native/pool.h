/* Threads that share the images of a batch. The caller works too and could do without them, so a pool that was closed, or
 * that the system gave no threads, is slower and nothing else. */
#ifndef RESNET_DIST_POOL_H
#define RESNET_DIST_POOL_H

#include <stdint.h>

#include "scratch.h"

typedef struct Pool Pool;

typedef void (*Work)(void *batch, int64_t item, Scratch *scratch);

/* Does work(batch, item, a scratch of its own) for every item from 0 on, and returns when all are done.
 * Batches of several callers come one after the other. */
void pool_run(Pool *pool, Work work, void *batch, int64_t num_items);

#endif
