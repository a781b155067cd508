#include "augment.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

typedef uint8_t Lut[3][256];

/* Pillow's ImagingBlend, in single precision: between `a` and `b`, or beyond `b`, cut to 0..255 and downwards. */
static INLINE uint8_t blend(int a, int b, float factor)
{
    float value = (float)a + factor * (float)(b - a);
    value = value > 0.0f ? value : 0.0f;
    return (uint8_t)(value < 255.0f ? value : 255.0f);
}

FOR_EACH_CPU static void blend_with_grey(uint8_t *image, int num_bytes, int grey, float factor)
{
    for (int i = 0; i < num_bytes; i++)
        image[i] = blend(grey, image[i], factor);
}

static INLINE int luminance(const uint8_t *rgb)
{
    return (rgb[0] * 19595 + rgb[1] * 38470 + rgb[2] * 7471 + 0x8000) >> 16;
}

FOR_EACH_CPU static void saturate(uint8_t *image, int num_pixels, float factor)
{
    for (int i = 0; i < num_pixels; i++, image += 3) {
        int grey = luminance(image);
        for (int channel = 0; channel < 3; channel++)
            image[channel] = blend(grey, image[channel], factor);
    }
}

FOR_EACH_CPU static int mean_luminance(const uint8_t *image, int num_pixels)
{
    int64_t total = 0;
    for (int i = 0; i < num_pixels; i++)
        total += luminance(image + 3 * i);
    return (int)((double)total / num_pixels + 0.5);
}

/* Pillow's SMOOTH: the px counts five times, its eight neighbours once; the rim stays as it is. In whole numbers: a
 * thirteenth is never a half, and floats are far nearer than that. */
FOR_EACH_CPU static void sharpen_row(const uint8_t *restrict above, const uint8_t *restrict in,
                                     const uint8_t *restrict below, int num_bytes, float factor,
                                     uint8_t *restrict out)
{
    for (int i = 3; i < num_bytes - 3; i++) {
        int sum = above[i - 3] + above[i] + above[i + 3] + in[i - 3] + 5 * in[i] + in[i + 3] + below[i - 3] +
                  below[i] + below[i + 3];
        out[i] = blend((2 * sum + 13) * 20165 >> 19, in[i], factor); /* the quotient by 26, up to 2 * 3315 + 13 */
    }
}

static void sharpen(const uint8_t *source, uint8_t *image, int size, float factor)
{
    size_t row = 3 * (size_t)size;
    for (size_t y = 1; y + 1 < (size_t)size; y++)
        sharpen_row(source + (y - 1) * row, source + y * row, source + (y + 1) * row, (int)row, factor,
                    image + y * row);
}

FOR_EACH_CPU static void look_up(uint8_t *image, int num_pixels, Lut lut)
{
    for (int i = 0; i < num_pixels; i++, image += 3) {
        image[0] = lut[0][image[0]];
        image[1] = lut[1][image[1]];
        image[2] = lut[2][image[2]];
    }
}

static void count_levels(const uint8_t *image, int num_pixels, int counts[3][256])
{
    memset(counts, 0, 3 * 256 * sizeof(int));
    for (int i = 0; i < num_pixels; i++, image += 3)
        counts[0][image[0]]++, counts[1][image[1]]++, counts[2][image[2]]++;
}

/* Pillow's ImageOps.autocontrast: the darkest level of a channel becomes 0, the lightest 255. */
static void plan_autocontrast(const int counts[256], uint8_t lut[256])
{
    int low = 0, high = 255;
    while (low < 255 && counts[low] == 0)
        low++;
    while (high > 0 && counts[high] == 0)
        high--;
    double scale = high > low ? 255.0 / (high - low) : 1.0, offset = high > low ? -low * scale : 0.0;
    for (int level = 0; level < 256; level++) {
        double value = trunc(level * scale + offset);
        lut[level] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

/* Pillow's ImageOps.equalize: levels spread so that about as many px have each. */
static void plan_equalize(const int counts[256], uint8_t lut[256])
{
    int total = 0, num_levels = 0, last = 0;
    for (int level = 0; level < 256; level++) {
        total += counts[level], num_levels += counts[level] > 0;
        last = counts[level] > 0 ? counts[level] : last;
    }
    int step = num_levels > 1 ? (total - last) / 255 : 0, passed = step / 2;
    for (int level = 0; level < 256; level++) {
        int value = step == 0 ? level : passed / step;
        lut[level] = (uint8_t)(value > 255 ? 255 : value);
        passed += counts[level];
    }
}

static int64_t fixed_point(double value)
{
    return value > -1e5 && value < 1e5 ? (int64_t)floor(value * 65536.0 + 0.5) : 0;
}

/* Pillow's affine_fixed: the nearest px, found in steps of 1/65536 px. */
FOR_EACH_CPU static void transform(const uint8_t *source, uint8_t *image, int size, const double m[6])
{
    int64_t a = fixed_point(m[0]), b = fixed_point(m[1]), d = fixed_point(m[3]), e = fixed_point(m[4]);
    int64_t first_x = fixed_point(m[2] + m[0] * 0.5 + m[1] * 0.5);
    int64_t first_y = fixed_point(m[5] + m[3] * 0.5 + m[4] * 0.5);
    for (int row = 0; row < size; row++, first_x += b, first_y += e) {
        int64_t x = first_x, y = first_y;
        for (int column = 0; column < size; column++, x += a, y += d, image += 3) {
            uint64_t from_x = (uint64_t)(x >> 16), from_y = (uint64_t)(y >> 16);
            if (from_x < (uint64_t)size && from_y < (uint64_t)size)
                memcpy(image, source + 3 * (from_y * (uint64_t)size + from_x), 3);
            else
                memset(image, 0, 3);
        }
    }
}

/* What `value` means as a whole number in low..high. */
static int within(double value, int low, int high)
{
    return value > low ? (value < high ? (int)value : high) : low;
}

static void erase(uint8_t *image, int size, const double values[7])
{
    int top = within(values[0], 0, size), left = within(values[1], 0, size);
    int height = within(values[2], 0, size - top), width = within(values[3], 0, size - left);
    uint8_t colour[3];
    for (int channel = 0; channel < 3; channel++)
        colour[channel] = (uint8_t)within(values[4 + channel], 0, 255);
    for (int y = top; y < top + height; y++)
        for (int x = left; x < left + width; x++)
            memcpy(image + 3 * ((size_t)y * size + x), colour, 3);
}

static void plan_look_up(const uint8_t *image, int num_pixels, const Operation *operation, Lut lut)
{
    int counts[3][256], bits = within(operation->values[0], 0, 8), mask = ~((1 << (8 - bits)) - 1);
    if (operation->kind == AUTOCONTRAST || operation->kind == EQUALIZE)
        count_levels(image, num_pixels, counts);
    for (int channel = 0; channel < 3; channel++) {
        if (operation->kind == AUTOCONTRAST)
            plan_autocontrast(counts[channel], lut[channel]);
        else if (operation->kind == EQUALIZE)
            plan_equalize(counts[channel], lut[channel]);
        else
            for (int level = 0; level < 256; level++) {
                int inverted = operation->kind == INVERT ||
                               (operation->kind == SOLARIZE && !(level < operation->values[0]));
                int value = inverted ? 255 - level : level;
                value = operation->kind == POSTERIZE ? value & mask : value;
                value = operation->kind == ADD ? within(floor(level + operation->values[channel] + 0.5), 0, 255) : value;
                lut[channel][level] = (uint8_t)value;
            }
    }
}

static void apply(const Operation *operation, uint8_t *image, int size, uint8_t *copy)
{
    int num_pixels = size * size;
    float factor = (float)operation->values[0];
    Lut lut;
    switch (operation->kind) {
    case BRIGHTNESS: blend_with_grey(image, 3 * num_pixels, 0, factor); break;
    case CONTRAST: blend_with_grey(image, 3 * num_pixels, mean_luminance(image, num_pixels), factor); break;
    case SATURATION: saturate(image, num_pixels, factor); break;
    case HUE: turn_hue(image, num_pixels, within(operation->values[0], 0, 255)); break;
    case SHARPNESS:
        memcpy(copy, image, 3 * (size_t)num_pixels);
        sharpen(copy, image, size, factor);
        break;
    case AFFINE:
        memcpy(copy, image, 3 * (size_t)num_pixels);
        transform(copy, image, size, operation->values);
        break;
    case ERASE: erase(image, size, operation->values); break;
    case POSTERIZE:
    case SOLARIZE:
    case AUTOCONTRAST:
    case EQUALIZE:
    case ADD:
    case INVERT:
        plan_look_up(image, num_pixels, operation, lut);
        look_up(image, num_pixels, lut);
        break;
    default: break;
    }
}

int resnet_dist_augment(int64_t num_images, int64_t num_operations, const Operation *operations, int64_t size,
                        uint8_t *images)
{
    size_t image_bytes = 3 * (size_t)size * (size_t)size;
    uint8_t *copy = malloc(image_bytes);
    if (copy == NULL)
        return -1;
    for (int64_t k = 0; k < num_images; k++)
        for (int64_t j = 0; j < num_operations; j++)
            apply(&operations[k * num_operations + j], images + (size_t)k * image_bytes, (int)size, copy);
    free(copy);
    return 0;
}
