/* Operations on decoded px, with Pillow's arithmetic: its results bit for bit, as torchvision's transforms use them. */
#ifndef RESNET_DIST_AUGMENT_H
#define RESNET_DIST_AUGMENT_H

#include <stdint.h>

/* Numbered as `OperationKind` in augment.py. `values` are: */
enum {
    IDENTITY,
    BRIGHTNESS,   /* factor */
    CONTRAST,     /* factor */
    SATURATION,   /* factor */
    SHARPNESS,    /* factor */
    HUE,          /* what is added to the hue, 256 being a full turn */
    POSTERIZE,    /* bits kept, 0 to 8 */
    SOLARIZE,     /* what is not below this is inverted */
    AUTOCONTRAST, /* - */
    EQUALIZE,     /* - */
    AFFINE,       /* a b c d e f: the px at (x, y) comes from (a x + b y + c, d x + e y + f), black if there is none */
    ADD,          /* red, green, blue */
    ERASE,        /* top, left, height, width, red, green, blue */
    INVERT        /* - */
};

typedef struct {
    int64_t kind;
    double values[8];
} Operation;

/* Applies the `num_operations` operations of each image, one after another, to `images` [num_images][size][size][3].
 * 0, or -1 without memory. `size`: 1 to 16384. */
int resnet_dist_augment(int64_t num_images, int64_t num_operations, const Operation *operations, int64_t size,
                        uint8_t *images);

/* The hue of RGB px turned by `shift` / 256 of a circle, by way of 8-bit HSV as Pillow's. */
void turn_hue(uint8_t *image, int num_pixels, int shift);

#endif
