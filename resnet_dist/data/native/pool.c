#define _GNU_SOURCE /* pthread_setname_np */
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef struct {
    Work work;
    void *batch;
    int64_t num_items;
    _Atomic int64_t next; /* the next item to take */
} Job;

struct Pool {
    pthread_mutex_t lock; /* over all that follows, and never held while there is work to do */
    pthread_cond_t begun, ended;
    Job *job;             /* NULL: no helper may begin */
    uint64_t job_number;
    int num_inside;       /* helpers that work on `job`, which lives on its caller's stack */
    int is_closed;
    int num_references;   /* the owner's, and one for each thread: the last one frees */
    Scratch *caller_scratch;
};

static void share(Job *job, Scratch *scratch)
{
    for (;;) {
        int64_t item = atomic_fetch_add(&job->next, 1);
        if (item >= job->num_items)
            return;
        job->work(job->batch, item, scratch);
    }
}

/* With the lock held, which it lets go. */
static void drop_reference(Pool *pool)
{
    int is_last = --pool->num_references == 0;
    pthread_mutex_unlock(&pool->lock);
    if (!is_last)
        return;
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->begun);
    pthread_cond_destroy(&pool->ended);
    scratch_free(pool->caller_scratch);
    free(pool);
}

static void *help(void *given)
{
    Pool *pool = given;
    Scratch *scratch = calloc(1, sizeof *scratch);
    uint64_t last_seen = 0;
    pthread_mutex_lock(&pool->lock);
    while (!pool->is_closed && scratch != NULL) {
        if (pool->job == NULL || pool->job_number == last_seen) {
            pthread_cond_wait(&pool->begun, &pool->lock);
            continue;
        }
        Job *job = pool->job;
        last_seen = pool->job_number;
        pool->num_inside++;
        pthread_mutex_unlock(&pool->lock);
        share(job, scratch);
        pthread_mutex_lock(&pool->lock);
        if (--pool->num_inside == 0)
            pthread_cond_broadcast(&pool->ended);
    }
    if (scratch != NULL)
        scratch_free(scratch);
    drop_reference(pool);
    return NULL;
}

void pool_run(Pool *pool, Work work, void *batch, int64_t num_items)
{
    Job job = {work, batch, num_items, 0};
    pthread_mutex_lock(&pool->lock);
    while (pool->job != NULL || pool->num_inside > 0)
        pthread_cond_wait(&pool->ended, &pool->lock);
    pool->job = &job;
    pool->job_number++;
    if (num_items > 1)
        pthread_cond_broadcast(&pool->begun);
    pthread_mutex_unlock(&pool->lock);
    share(&job, pool->caller_scratch);
    pthread_mutex_lock(&pool->lock);
    pool->job = NULL;
    while (pool->num_inside > 0)
        pthread_cond_wait(&pool->ended, &pool->lock);
    pthread_cond_broadcast(&pool->ended); /* for the next caller */
    pthread_mutex_unlock(&pool->lock);
}

/* A pool for `num_threads` threads, its callers' among them; NULL without memory. The system may give fewer. */
Pool *resnet_dist_pool_open(int64_t num_threads)
{
    Pool *pool = calloc(1, sizeof *pool);
    Scratch *scratch = calloc(1, sizeof *scratch);
    if (pool == NULL || scratch == NULL) {
        free(pool), free(scratch);
        return NULL;
    }
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->begun, NULL);
    pthread_cond_init(&pool->ended, NULL);
    pool->num_references = 1;
    pool->caller_scratch = scratch;
    sigset_t all, before; /* signals are Python's main thread's */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_mutex_lock(&pool->lock);
    for (int64_t k = 1; k < num_threads; k++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, pool) != 0)
            break;
        pthread_setname_np(thread, "beton-decode");
        pthread_detach(thread);
        pool->num_references++;
    }
    pthread_mutex_unlock(&pool->lock);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool;
}

/* Ends the threads, each after the batch it works on; does not wait for them. The pool can still be used. */
void resnet_dist_pool_close(Pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->is_closed = 1;
    pthread_cond_broadcast(&pool->begun);
    pthread_mutex_unlock(&pool->lock);
}

/* After resnet_dist_pool_close, and after the last call of the pool. */
void resnet_dist_pool_release(Pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    drop_reference(pool);
}
