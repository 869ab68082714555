/* Preloaded into TPU-MLIR's last compile step of a net whose weights are a probe, which is nearly all zeros:
   zeros that are copied or read onto zeros are not written.

   Memory fresh from the kernel reads as zeros and takes room only once it is written. The step copies the
   weights four times over; this leaves the copies where they are needed and free of cost where the probe is
   empty (1.8B geometry: 0.76 GB instead of 2.56 GB, and two thirds of the processor time). Every byte has the
   value it would have without this. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define LARGE ((size_t)1 << 20)
#define PAGE 4096
#define PIECE ((size_t)1 << 14)

static void *(*libc_memcpy)(void *, const void *, size_t);
static void *(*libc_memset)(void *, int, size_t);
static size_t (*libc_fread)(void *, size_t, size_t, FILE *);

__attribute__((constructor)) static void find_originals(void)
{
    libc_memset = (void *(*)(void *, int, size_t))dlsym(RTLD_NEXT, "memset");
    libc_fread = (size_t (*)(void *, size_t, size_t, FILE *))dlsym(RTLD_NEXT, "fread");
    libc_memcpy = (void *(*)(void *, const void *, size_t))dlsym(RTLD_NEXT, "memcpy");
}

/* Whether a page's worth of bytes is zeros. */
static int zeros(const char *at)
{
    uint64_t word[8];
    size_t i;

    for (i = 0; i < PAGE; i += sizeof word) {
        __builtin_memcpy(word, at + i, sizeof word);
        if (word[0] | word[1] | word[2] | word[3] | word[4] | word[5] | word[6] | word[7])
            return 0;
    }
    return 1;
}

static size_t to_page(const char *at, size_t size)
{
    size_t head = -(uintptr_t)at % PAGE;
    return head < size ? head : size;
}

static void copy(char *to, const char *from, size_t size)
{
    size_t head = to_page(to, size);

    libc_memcpy(to, from, head);
    for (to += head, from += head, size -= head; size >= PAGE; to += PAGE, from += PAGE, size -= PAGE)
        if (!zeros(from) || !zeros(to))
            libc_memcpy(to, from, PAGE);
    libc_memcpy(to, from, size);
}

void *memcpy(void *restrict to, const void *restrict from, size_t size)
{
    if (!libc_memcpy) { /* the loader is still at work */
        volatile char *out = to;
        const char *in = from;
        while (size--)
            *out++ = *in++;
    } else if (size < LARGE || (uintptr_t)to - (uintptr_t)from < size) { /* overlaps are libc's business */
        libc_memcpy(to, from, size);
    } else {
        copy(to, from, size);
    }
    return to;
}

void *memset(void *to, int value, size_t size)
{
    char *at = to;
    size_t head;

    if (!libc_memset) {
        volatile char *out = to;
        while (size--)
            *out++ = (char)value;
    } else if (size < LARGE || (value & 0xff)) {
        libc_memset(to, value, size);
    } else {
        head = to_page(at, size);
        libc_memset(at, 0, head);
        for (at += head, size -= head; size >= PAGE; at += PAGE, size -= PAGE)
            if (!zeros(at))
                libc_memset(at, 0, PAGE);
        libc_memset(at, 0, size);
    }
    return to;
}

size_t fread(void *restrict to, size_t size, size_t count, FILE *restrict file)
{
    char piece[PIECE];
    size_t left = size * count, got;
    char *at = to;

    if (!libc_fread)
        find_originals();
    if (left < LARGE || !libc_memcpy)
        return libc_fread(to, size, count, file);
    while (left && (got = libc_fread(piece, 1, left < PIECE ? left : PIECE, file))) {
        copy(at, piece, got);
        at += got;
        left -= got;
    }
    return (size_t)(at - (char *)to) / size;
}
