#include "augment.h"
#include "cpu.h"

/* Pillow's rgb2hsv_row (src/libImaging/Convert.c) after colorsys: where it computes in double, so does this. */
static INLINE void to_hsv(const uint8_t *rgb, int *hue, int *saturation, int *value)
{
    int r = rgb[0], g = rgb[1], b = rgb[2];
    int most = r > g ? r : g, least = r < g ? r : g;
    most = most > b ? most : b, least = least < b ? least : b;
    *hue = *saturation = 0, *value = most;
    if (most == least)
        return;
    float range = (float)(most - least), h;
    float red = (float)(most - r) / range, green = (float)(most - g) / range, blue = (float)(most - b) / range;
    if (r == most)
        h = blue - green;
    else if (g == most)
        h = (float)(2.0 + red - blue);
    else
        h = (float)(4.0 + green - red);
    double turned = h / 6.0 + 1.0; /* 5/6 to 11/6 */
    h = (float)(turned >= 1.0 ? turned - 1.0 : turned);
    *hue = (int)(h * 255.0);
    *saturation = (int)(range / (float)most * 255.0);
}

static INLINE int rounded(double x)
{
    return (int)(x + 0.5);
}

static INLINE void to_rgb(int hue, int saturation, int value, uint8_t *rgb)
{
    int sector = (int)((float)hue * 6.0 / 255.0);
    float rest = (float)((float)hue * 6.0 / 255.0 - (float)sector), s = (float)((float)saturation / 255.0);
    uint8_t v = (uint8_t)value, p = (uint8_t)rounded((float)value * (1.0 - s));
    uint8_t q = (uint8_t)rounded((float)value * (1.0 - s * rest));
    uint8_t t = (uint8_t)rounded((float)value * (1.0 - s * (1.0 - rest)));
    switch (sector % 6) {
    case 0: rgb[0] = v, rgb[1] = t, rgb[2] = p; break;
    case 1: rgb[0] = q, rgb[1] = v, rgb[2] = p; break;
    case 2: rgb[0] = p, rgb[1] = v, rgb[2] = t; break;
    case 3: rgb[0] = p, rgb[1] = q, rgb[2] = v; break;
    case 4: rgb[0] = t, rgb[1] = p, rgb[2] = v; break;
    default: rgb[0] = v, rgb[1] = p, rgb[2] = q;
    }
}

FOR_EACH_CPU void turn_hue(uint8_t *image, int num_pixels, int shift)
{
    for (int i = 0; i < num_pixels; i++, image += 3) {
        int hue, saturation, value;
        to_hsv(image, &hue, &saturation, &value);
        to_rgb((hue + shift) & 255, saturation, value, image);
    }
}
