/* Whether a baseline JPEG is sound to its last bit. Only Huffman codes are followed: no coefficient is kept.
 *
 * The answer goes one way. "Sound" says that libjpeg-turbo decodes the file to its end without a warning; whatever is
 * unusual, damaged or only doubtful is "not sure", and libjpeg-turbo itself is asked. So every rule here may be stricter
 * than libjpeg's, and none may be laxer.
 *
 * Where the time goes: each look-up waits for the one before it, some 10 cycles, and a block ends where no CPU guesses
 * it. So one look-up steps over as many whole codes as its bits hold, and two files are followed in turns, one working
 * while the other waits. Three were no faster; the block's end as conditional moves instead of a branch (assembly, for
 * no compiler makes it so) took 0.9 of the time, which is not worth it. */
#include "jpeg_bytes.h"
#include "jpeg_markers.h"

#include <stdlib.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)

enum {
    NUM_STREAMS = 2,
    PADDING = 128,    /* zeros behind the data: more than is read between two looks at its end */
    STEPS_AT_ONCE = 2 /* between two fillings of the window, see `fill` */
};

/* What the next code is: a block's DC difference, or one of its AC coefficients. In a ring, one MCU long. */
typedef struct State {
    const LookUp *next_look_up;
    const struct State *next;
    int next_counter;
} State;

/* The position in a file. */
typedef struct {
    uint64_t window; /* the next bits, from the top */
    const uint8_t *next, *end; /* PADDING zeros follow the end */
    const LookUp *look_up;
    const State *state;
    unsigned num_bits; /* in `window`, those that `next` has passed */
    int counter;       /* see `Step` */
    int states_left;
} Cursor;

/* One file that is being checked, and memory that is reused for the next ones. */
typedef struct {
    Cursor cursor;
    uint8_t *clean;     /* the scan's data without stuffing */
    size_t clean_size;
    LookUp *dc, *ac; /* NUM_TABLES each */
    State ring[2 * MAX_BLOCKS_IN_MCU];
    Scan scan;
} Stream;

/* The scan's data up to the end of the image, without the zero that follows each FF. */
static int take_out_stuffing(const uint8_t *at, const uint8_t *end, Stream *stream)
{
    size_t size = (size_t)(end - at) + PADDING;
    if (stream->clean_size < size) {
        free(stream->clean);
        stream->clean = malloc(size);
        stream->clean_size = stream->clean ? size : 0;
        if (!stream->clean)
            return 0;
    }
    uint8_t *clean = stream->clean;
    for (;;) {
        const uint8_t *special = memchr(at, 0xFF, (size_t)(end - at));
        if (!special || special + 1 >= end)
            return 0;
        size_t length = (size_t)(special - at) + 1;
        memcpy(clean, at, length);
        clean += length;
        at = special + 2;
        if (special[1] == EOI)
            break;
        if (special[1] != 0)
            return 0;
    }
    stream->cursor.end = clean - 1; /* less the FF of the marker */
    memset(clean - 1, 0, PADDING);
    return 1;
}

static int build_look_ups(Stream *stream)
{
    const Scan *scan = &stream->scan;
    unsigned built_dc = 0, built_ac = 0;
    for (int k = 0; k < scan->num_components; k++) {
        int dc = scan->dc_of[k], ac = scan->ac_of[k];
        if (!(built_dc >> dc & 1) && !build_look_up(&stream->dc[dc], &scan->dc[dc], 0))
            return 0;
        if (!(built_ac >> ac & 1) && !build_look_up(&stream->ac[ac], &scan->ac[ac], 1))
            return 0;
        built_dc |= 1u << dc;
        built_ac |= 1u << ac;
    }
    return 1;
}

/* Everything up to the first code. False: not sure. */
static int begin(Stream *stream, const uint8_t *file, size_t size)
{
    Scan *scan = &stream->scan;
    if (!read_markers(file, size, scan) || !build_look_ups(stream) || !take_out_stuffing(scan->data, file + size, stream))
        return 0;
    int num_states = 2 * scan->blocks_in_mcu;
    for (int k = 0; k < num_states; k++) {
        int next = k + 1 < num_states ? k + 1 : 0, component = scan->component_of[next / 2];
        stream->ring[k].next = &stream->ring[next];
        stream->ring[k].next_look_up = next % 2 ? &stream->ac[scan->ac_of[component]] : &stream->dc[scan->dc_of[component]];
        stream->ring[k].next_counter = LIVE + (next % 2 ? AC_COEFFICIENTS : 1);
    }
    const State *last = &stream->ring[num_states - 1];
    stream->cursor = (Cursor){
        .next = stream->clean,
        .end = stream->cursor.end,
        .look_up = last->next_look_up,
        .state = last->next,
        .counter = last->next_counter,
        .states_left = 2 * scan->num_blocks,
    };
    return 1;
}

/* At least 56 bits: two codes of 16 with values of 11. The bits above num_bits are read once more; they are the same. */
static INLINE void fill(Cursor *at)
{
    uint64_t eight;
    memcpy(&eight, at->next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    eight = __builtin_bswap64(eight);
#endif
    at->window |= eight >> at->num_bits;
    at->next += (63 - at->num_bits) >> 3;
    at->num_bits |= 56;
}

/* One look-up. False: not as expected. */
static INLINE int advance(Cursor *at)
{
    Step step = at->look_up->several[at->window >> (64 - LOOK_BITS)];
    int counter = at->counter - taken_by(step);
    if (UNLIKELY(counter & TOO_MANY)) {
        step = first_step(at->look_up, at->window);
        counter = at->counter - taken_by(step);
        if (step == 0 || counter & TOO_MANY)
            return 0;
    }
    const State *state = at->state;
    int is_complete = counter <= LIVE;
    at->window <<= bits_of(step);
    at->num_bits -= bits_of(step);
    at->look_up = is_complete ? state->next_look_up : at->look_up;
    at->counter = is_complete ? state->next_counter : counter;
    at->state = is_complete ? state->next : state;
    at->states_left -= is_complete;
    return 1;
}

/* False when it is close to its end, beyond it, or not as expected. */
static INLINE int advance_twice(Cursor *at)
{
    fill(at);
    return advance(at) && advance(at) && at->states_left > STEPS_AT_ONCE && at->next <= at->end + 8;
}

/* Continues where `advance_twice` stopped: all parts must be there, and no whole byte left over. */
static int ends_well(Cursor *at)
{
    while (at->states_left > 0 && at->next <= at->end + 8) {
        fill(at);
        if (!advance(at))
            return 0;
    }
    int64_t left = 8 * (at->end - at->next) + (int64_t)at->num_bits;
    return at->states_left == 0 && left >= 0 && left < 8;
}

typedef struct {
    const uint8_t *const *files;
    const size_t *sizes;
    uint8_t *sound;
    int count, taken;
} Queue;

/* Puts the next file that is worth following on the stream, and returns its number; -1 behind the last. Files of a few
 * blocks are followed to their end here. */
static int take(Queue *queue, Stream *stream)
{
    while (queue->taken < queue->count) {
        int file = queue->taken++;
        if (!begin(stream, queue->files[file], queue->sizes[file]))
            continue;
        if (stream->cursor.states_left > STEPS_AT_ONCE)
            return file;
        queue->sound[file] = (uint8_t)ends_well(&stream->cursor);
    }
    return -1;
}

static void follow(Queue *queue, Stream streams[NUM_STREAMS])
{
    int file[NUM_STREAMS];
    for (int k = 0; k < NUM_STREAMS; k++)
        file[k] = take(queue, &streams[k]);
    while (file[0] >= 0 && file[1] >= 0) {
        Cursor a = streams[0].cursor, b = streams[1].cursor; /* copies, which stay in registers */
        int goes[NUM_STREAMS] = {1, 1};
        while (goes[0] & goes[1]) {
            goes[0] = advance_twice(&a);
            goes[1] = advance_twice(&b);
        }
        streams[0].cursor = a, streams[1].cursor = b;
        for (int k = 0; k < NUM_STREAMS; k++) {
            if (goes[k])
                continue;
            queue->sound[file[k]] = (uint8_t)ends_well(&streams[k].cursor);
            file[k] = take(queue, &streams[k]);
        }
    }
    for (int k = 0; k < NUM_STREAMS; k++) {
        if (file[k] < 0)
            continue;
        while (advance_twice(&streams[k].cursor))
            ;
        queue->sound[file[k]] = (uint8_t)ends_well(&streams[k].cursor);
    }
}

/* sound[k] becomes 1 where files[k], of sizes[k] bytes, is sure to be sound, else 0. */
__attribute__((visibility("default"))) void data_prep_jpegs_are_sound(const uint8_t *const *files, const size_t *sizes,
                                                                      int count, uint8_t *sound)
{
    Stream *streams = calloc(NUM_STREAMS, sizeof *streams);
    LookUp *look_ups = malloc(2 * NUM_STREAMS * NUM_TABLES * sizeof *look_ups);
    memset(sound, 0, (size_t)count);
    if (streams && look_ups) {
        for (int k = 0; k < NUM_STREAMS; k++) {
            streams[k].dc = look_ups + 2 * k * NUM_TABLES;
            streams[k].ac = streams[k].dc + NUM_TABLES;
        }
        Queue queue = {files, sizes, sound, count, 0};
        follow(&queue, streams);
        for (int k = 0; k < NUM_STREAMS; k++)
            free(streams[k].clean);
    }
    free(streams);
    free(look_ups);
}
