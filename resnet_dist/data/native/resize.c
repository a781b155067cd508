#include "resize.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "lanes.h"

enum { PRECISION_BITS = 32 - 8 - 2, HALF = 1 << (PRECISION_BITS - 1) };

static double triangle(double x)
{
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

/* Weights of output `i` of `out` from `in` px: [*first, *first + count) as fixed-point numbers, zeros at the ends cut
 * off. Pillow's precompute_coeffs and normalize_coeffs_8bpc, in the same order of operations. */
static int weigh(int in, int out, int i, double *exact, int32_t *weights, int *first)
{
    double scale = (double)in / out, width = scale < 1.0 ? 1.0 : scale;
    double center = (i + 0.5) * scale, shrink = 1.0 / width, total = 0.0;
    int low = (int)(center - width + 0.5), high = (int)(center + width + 0.5);
    if (low < 0)
        low = 0;
    if (high > in)
        high = in;
    for (int k = 0; k < high - low; k++) {
        exact[k] = triangle((k + low - center + 0.5) * shrink);
        total += exact[k];
    }
    int count = 0;
    *first = low;
    for (int k = 0; k < high - low; k++) {
        int32_t weight = (int32_t)(0.5 + exact[k] / total * (1 << PRECISION_BITS));
        if (count == 0 && weight == 0)
            *first = low + k + 1;
        else
            weights[count++] = weight;
    }
    while (count > 0 && weights[count - 1] == 0)
        count--;
    return count;
}

static int axis_plan(Axis *axis, int in, int out, int window, int size, int mirrored, int copies)
{
    int most = (int)ceil(in > out ? (double)in / out : 1.0) * 2 + 1;
    double *exact = malloc(most * sizeof *exact);
    int32_t *packed = malloc((size_t)size * most * sizeof *packed);
    int32_t *count = malloc(size * sizeof *count);
    axis->first = malloc(size * sizeof *axis->first);
    int ready = exact && packed && count && axis->first;
    if (ready) {
        int taps = 1, start = in, end = 0;
        for (int i = 0; i < size; i++) {
            int output = window + (mirrored ? size - 1 - i : i), first;
            count[i] = weigh(in, out, output, exact, packed + (size_t)i * most, &first);
            axis->first[i] = first;
            taps = count[i] > taps ? count[i] : taps;
            start = first < start ? first : start;
            end = first + count[i] > end ? first + count[i] : end;
        }
        axis->size = size, axis->taps = taps, axis->start = start, axis->length = end - start;
        axis->weights = calloc((size_t)size * taps * copies, sizeof *axis->weights);
        ready = axis->weights != NULL;
    }
    for (int i = 0; ready && i < size; i++) {
        int32_t *weights = axis->weights + (size_t)i * axis->taps * copies;
        int first = axis->first[i] - axis->start, last = axis->length - axis->taps;
        int shift = first > last ? first - last : 0; /* no output may reach behind the last px */
        axis->first[i] = first - shift;
        for (int k = 0; k < count[i]; k++)
            for (int copy = 0; copy < copies; copy++)
                weights[(k + shift) * copies + copy] = packed[(size_t)i * most + k];
    }
    free(exact), free(packed), free(count);
    return ready ? 0 : -1;
}

/* One row along the columns. Four lanes for three channels: the fourth computes the next px' red for nothing and is
 * overwritten by it. `taps` is a constant where this is inlined: loops of a length that the CPU must guess cost more. */
static INLINE void filter_columns(const Axis *axis, int taps, const uint8_t *row, uint8_t *output)
{
    const Lanes *weights = (const Lanes *)axis->weights;
    for (int i = 0; i < axis->size; i++, weights += taps, output += 3) {
        const uint8_t *source = row + 3 * axis->first[i];
        Lanes sum = {HALF, HALF, HALF, HALF};
        for (int k = 0; k < taps; k++)
            sum += load_pixel(source + 3 * k) * weights[k];
        store_pixel(sum >> PRECISION_BITS, output); /* clipped: the rounding of some 10,000 weights may pass 255 */
    }
}

static INLINE void blend(int taps, const uint8_t *const *rows, const int32_t *weights, int bytes,
                         uint8_t *restrict output)
{
    for (int i = 0; i < bytes; i++) {
        int32_t sum = HALF;
        for (int k = 0; k < taps; k++)
            sum += rows[k][i] * weights[k];
        output[i] = (uint8_t)(sum >> PRECISION_BITS);
    }
}

FOR_EACH_CPU static void push_filtered(const Resizer *resizer, const uint8_t *row, uint8_t *output)
{
    const Axis *columns = &resizer->columns;
    switch (columns->taps) {
    case 1: filter_columns(columns, 1, row, output); break;
    case 2: filter_columns(columns, 2, row, output); break;
    case 3: filter_columns(columns, 3, row, output); break;
    case 4: filter_columns(columns, 4, row, output); break;
    case 5: filter_columns(columns, 5, row, output); break;
    case 6: filter_columns(columns, 6, row, output); break;
    default: filter_columns(columns, columns->taps, row, output);
    }
}

static int ring_stride(const Resizer *resizer)
{
    return 3 * resizer->columns.size + ROW_PADDING_BYTES;
}

static uint8_t *ring_row(const Resizer *resizer, int row)
{
    return resizer->filtered + (size_t)(row % resizer->rows.taps) * ring_stride(resizer);
}

static void blend_many(Resizer *resizer, int first, const int32_t *weights, int bytes, uint8_t *restrict output)
{
    int32_t *restrict sums = resizer->sums;
    for (int i = 0; i < bytes; i++)
        sums[i] = HALF;
    for (int k = 0; k < resizer->rows.taps; k++) {
        const uint8_t *restrict row = ring_row(resizer, first + k);
        for (int i = 0; i < bytes; i++)
            sums[i] += row[i] * weights[k];
    }
    for (int i = 0; i < bytes; i++) {
        int32_t value = sums[i] >> PRECISION_BITS;
        output[i] = (uint8_t)(value > 255 ? 255 : value);
    }
}

enum { MOST_UNROLLED = 6 };

FOR_EACH_CPU static void write_row(Resizer *resizer, int first, const int32_t *weights, uint8_t *output)
{
    int taps = resizer->rows.taps, bytes = 3 * resizer->columns.size;
    const uint8_t *rows[MOST_UNROLLED];
    for (int k = 0; k < taps && k < MOST_UNROLLED; k++)
        rows[k] = ring_row(resizer, first + k);
    switch (taps) {
    case 1: memcpy(output, rows[0], bytes); break; /* its one weight is 1 */
    case 2: blend(2, rows, weights, bytes, output); break;
    case 3: blend(3, rows, weights, bytes, output); break;
    case 4: blend(4, rows, weights, bytes, output); break;
    case 5: blend(5, rows, weights, bytes, output); break;
    case 6: blend(6, rows, weights, bytes, output); break;
    default: blend_many(resizer, first, weights, bytes, output);
    }
}

int resizer_plan(Resizer *resizer, int height, int width, int resized_height, int resized_width, int window_top,
                 int window_left, int size, int mirrored)
{
    memset(resizer, 0, sizeof *resizer);
    if (axis_plan(&resizer->rows, height, resized_height, window_top, size, 0, 1) ||
        axis_plan(&resizer->columns, width, resized_width, window_left, size, mirrored, LANES))
        return -1;
    resizer->filtered = malloc((size_t)resizer->rows.taps * ring_stride(resizer));
    resizer->sums = malloc(3 * (size_t)size * sizeof *resizer->sums);
    return resizer->filtered && resizer->sums ? 0 : -1;
}

void resizer_push(Resizer *resizer, const uint8_t *row, uint8_t *output)
{
    const Axis *rows = &resizer->rows;
    push_filtered(resizer, row, ring_row(resizer, resizer->num_pushed));
    resizer->num_pushed++;
    while (resizer->num_written < rows->size &&
           rows->first[resizer->num_written] + rows->taps <= resizer->num_pushed) {
        int k = resizer->num_written++;
        write_row(resizer, rows->first[k], rows->weights + (size_t)k * rows->taps,
                  output + (size_t)k * 3 * rows->size);
    }
}

void resizer_free(Resizer *resizer)
{
    free(resizer->rows.first), free(resizer->rows.weights);
    free(resizer->columns.first), free(resizer->columns.weights);
    free(resizer->filtered), free(resizer->sums);
    memset(resizer, 0, sizeof *resizer);
}
