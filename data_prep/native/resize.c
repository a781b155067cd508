#include "resize.h"

#include <math.h>
#include <string.h>

#include "cpu.h"
#include "lanes.h"

enum { PRECISION_BITS = 32 - 8 - 2, HALF = 1 << (PRECISION_BITS - 1) };

static double bilinear(double x)
{
    return x < 1.0 ? 1.0 - x : 0.0;
}

/* a = -0.5 (Keys 1981). */
static double bicubic(double x)
{
    if (x < 1.0)
        return (1.5 * x - 2.5) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

static double hamming(double x)
{
    if (x == 0.0)
        return 1.0;
    if (x >= 1.0)
        return 0.0;
    x *= M_PI;
    return sin(x) / x * (0.54f + 0.46f * cos(x));
}

static double value_at(Filter filter, double x)
{
    x = fabs(x);
    return filter == HAMMING ? hamming(x) : filter == BICUBIC ? bicubic(x) : bilinear(x);
}

/* How many source px an output reaches to either side. */
static double reach_of(Filter filter, int in, int out)
{
    return (filter == BICUBIC ? 2.0 : 1.0) * (in > out ? (double)in / out : 1.0);
}

/* Weights of output `i` of `out` from `in` px: [*first, *first + count) as fixed-point numbers, zeros at the ends cut
 * off. Pillow's precompute_coeffs and normalize_coeffs_8bpc, in the same order of operations. */
static int weigh(Filter filter, int in, int out, int i, double *exact, int32_t *weights, int *first)
{
    double scale = (double)in / out, reach = reach_of(filter, in, out);
    double center = (i + 0.5) * scale, shrink = 1.0 / (scale < 1.0 ? 1.0 : scale), total = 0.0;
    int low = (int)(center - reach + 0.5), high = (int)(center + reach + 0.5);
    if (low < 0)
        low = 0;
    if (high > in)
        high = in;
    for (int k = 0; k < high - low; k++) {
        exact[k] = value_at(filter, (k + low - center + 0.5) * shrink);
        total += exact[k];
    }
    int count = 0;
    *first = low;
    for (int k = 0; k < high - low; k++) {
        double scaled = exact[k] / total * (1 << PRECISION_BITS);
        int32_t weight = (int32_t)(scaled < 0.0 ? scaled - 0.5 : scaled + 0.5);
        /* Not BICUBIC's: where it meets a px exactly, only that one counts, and the next output would begin before it.
         * The ring of rows needs beginnings that never go back. */
        if (count == 0 && weight == 0 && filter != BICUBIC)
            *first = low + k + 1;
        else
            weights[count++] = weight;
    }
    while (count > 0 && weights[count - 1] == 0)
        count--;
    return count;
}

static int axis_plan(Axis *axis, Scratch *scratch, Filter filter, int first_buffer, int weights_buffer, int in, int out,
                     int window, int size, int mirrored)
{
    int most = (int)ceil(reach_of(filter, in, out)) * 2 + 1;
    double *exact = scratch_take(scratch, EXACT_WEIGHTS, most * sizeof *exact);
    int32_t *packed = scratch_take(scratch, PACKED_WEIGHTS, (size_t)size * most * sizeof *packed);
    int32_t *count = scratch_take(scratch, WEIGHT_COUNTS, size * sizeof *count);
    axis->first = scratch_take(scratch, first_buffer, size * sizeof *axis->first);
    if (!exact || !packed || !count || !axis->first)
        return -1;
    int taps = 1, start = in, end = 0;
    for (int i = 0; i < size; i++) {
        int output = window + (mirrored ? size - 1 - i : i), first;
        count[i] = weigh(filter, in, out, output, exact, packed + (size_t)i * most, &first);
        axis->first[i] = first;
        taps = count[i] > taps ? count[i] : taps;
        start = first < start ? first : start;
        end = first + count[i] > end ? first + count[i] : end;
    }
    axis->size = size, axis->taps = taps, axis->start = start, axis->length = end - start;
    axis->weights = scratch_take(scratch, weights_buffer, (size_t)size * taps * sizeof *axis->weights);
    if (!axis->weights)
        return -1;
    memset(axis->weights, 0, (size_t)size * taps * sizeof *axis->weights);
    for (int i = 0; i < size; i++) {
        int first = axis->first[i] - axis->start, last = axis->length - axis->taps;
        int shift = first > last ? first - last : 0; /* no output may reach behind the last px */
        axis->first[i] = first - shift;
        memcpy(axis->weights + (size_t)i * taps + shift, packed + (size_t)i * most, count[i] * sizeof *packed);
    }
    return 0;
}

/* Two rows along the columns: `group` [columns][GROUP][LANES]. Four lanes for three channels: the fourth computes
 * something for nothing and is overwritten by the next px. `taps` is a constant where this is inlined: loops of a length
 * that the CPU must guess cost more. */
static INLINE void filter_columns(const Axis *axis, int taps, const int32_t *group, uint8_t *first, uint8_t *second)
{
    const int32_t *weights = axis->weights, *starts = axis->first;
    for (int i = 0, size = axis->size; i < size; i++, weights += taps) {
        const Sums *source = (const Sums *)group + starts[i];
        Sums sums = {HALF, HALF, HALF, HALF, HALF, HALF, HALF, HALF};
        for (int k = 0; k < taps; k++)
            sums += source[k] * weights[k];
        sums >>= PRECISION_BITS;
        store_pixels(&sums, first + 3 * i, second + 3 * i); /* clipped */
    }
}

static INLINE uint8_t clipped(int32_t value)
{
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* `clips`: not without negative weights, where a few rounded ones cannot pass 255. It takes a tenth of the time. */
static INLINE void blend(int taps, int clips, const uint8_t *const *rows, const int32_t *weights, int bytes,
                         uint8_t *restrict output)
{
    for (int i = 0; i < bytes; i++) {
        int32_t sum = HALF;
        for (int k = 0; k < taps; k++)
            sum += rows[k][i] * weights[k];
        sum >>= PRECISION_BITS;
        output[i] = clips ? clipped(sum) : (uint8_t)sum;
    }
}

FOR_EACH_CPU static void filter_group(const Resizer *resizer, uint8_t *first, uint8_t *second)
{
    const Axis *columns = &resizer->columns;
    const int32_t *group = resizer->group;
    switch (columns->taps) {
    case 1: filter_columns(columns, 1, group, first, second); break;
    case 2: filter_columns(columns, 2, group, first, second); break;
    case 3: filter_columns(columns, 3, group, first, second); break;
    case 4: filter_columns(columns, 4, group, first, second); break;
    case 5: filter_columns(columns, 5, group, first, second); break;
    case 6: filter_columns(columns, 6, group, first, second); break;
    case 7: filter_columns(columns, 7, group, first, second); break;
    case 8: filter_columns(columns, 8, group, first, second); break;
    default: filter_columns(columns, columns->taps, group, first, second);
    }
}

static int ring_stride(const Resizer *resizer)
{
    return 3 * resizer->columns.size + ROW_PADDING_BYTES;
}

static int ring_rows(const Resizer *resizer)
{
    return resizer->rows.taps + 1;
}

static uint8_t *ring_row(const Resizer *resizer, int row)
{
    return resizer->filtered + (size_t)(row % ring_rows(resizer)) * ring_stride(resizer);
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
    for (int i = 0; i < bytes; i++)
        output[i] = clipped(sums[i] >> PRECISION_BITS);
}

enum { MOST_UNROLLED = 8 };

static INLINE void blend_few(int taps, int clips, const uint8_t *const *rows, const int32_t *weights, int bytes,
                             uint8_t *output)
{
    switch (taps) {
    case 1: memcpy(output, rows[0], bytes); break; /* its one weight is 1 */
    case 2: blend(2, clips, rows, weights, bytes, output); break;
    case 3: blend(3, clips, rows, weights, bytes, output); break;
    case 4: blend(4, clips, rows, weights, bytes, output); break;
    case 5: blend(5, clips, rows, weights, bytes, output); break;
    case 6: blend(6, clips, rows, weights, bytes, output); break;
    case 7: blend(7, clips, rows, weights, bytes, output); break;
    case 8: blend(8, clips, rows, weights, bytes, output); break;
    }
}

FOR_EACH_CPU static void write_row(Resizer *resizer, int first, const int32_t *weights, uint8_t *output)
{
    int taps = resizer->rows.taps, bytes = 3 * resizer->columns.size;
    const uint8_t *rows[MOST_UNROLLED];
    for (int k = 0; k < taps && k < MOST_UNROLLED; k++)
        rows[k] = ring_row(resizer, first + k);
    if (taps > MOST_UNROLLED)
        blend_many(resizer, first, weights, bytes, output);
    else if (resizer->filter == BICUBIC)
        blend_few(taps, 1, rows, weights, bytes, output);
    else
        blend_few(taps, 0, rows, weights, bytes, output);
}

int resizer_plan(Resizer *resizer, Scratch *scratch, Filter filter, int height, int width, int resized_height,
                 int resized_width, Window window, int mirrored)
{
    memset(resizer, 0, sizeof *resizer);
    resizer->filter = filter;
    Axis *rows = &resizer->rows, *columns = &resizer->columns;
    if (axis_plan(rows, scratch, filter, ROW_FIRST, ROW_WEIGHTS, height, resized_height, window.top, window.height, 0) ||
        axis_plan(columns, scratch, filter, COLUMN_FIRST, COLUMN_WEIGHTS, width, resized_width, window.left,
                  window.width, mirrored))
        return -1;
    resizer->group = scratch_take(scratch, ROW_GROUP, (size_t)columns->length * sizeof(Sums));
    resizer->filtered = scratch_take(scratch, FILTERED_ROWS, (size_t)ring_rows(resizer) * ring_stride(resizer));
    resizer->sums = scratch_take(scratch, SUMS, 3 * (size_t)columns->size * sizeof *resizer->sums);
    return resizer->group && resizer->filtered && resizer->sums ? 0 : -1;
}

static void gather(Resizer *resizer, const uint8_t *row, int place)
{
    int32_t *lanes = resizer->group + place * LANES;
    for (int x = 0, length = resizer->columns.length; x < length; x++)
        widen_pixel(row + 3 * x, lanes + (size_t)x * GROUP * LANES);
}

void resizer_push(Resizer *resizer, const uint8_t *row, uint8_t *output)
{
    const Axis *rows = &resizer->rows;
    int place = resizer->num_pushed++ % GROUP, is_last = resizer->num_pushed == rows->length;
    gather(resizer, row, place);
    if (place == 0 && !is_last)
        return;
    if (place == 0)
        gather(resizer, row, 1); /* a row that no one looks at */
    filter_group(resizer, ring_row(resizer, resizer->num_filtered), ring_row(resizer, resizer->num_filtered + 1));
    resizer->num_filtered += GROUP;
    while (resizer->num_written < rows->size &&
           rows->first[resizer->num_written] + rows->taps <= resizer->num_filtered) {
        int k = resizer->num_written++;
        write_row(resizer, rows->first[k], rows->weights + (size_t)k * rows->taps,
                  output + (size_t)k * 3 * resizer->columns.size);
    }
}
