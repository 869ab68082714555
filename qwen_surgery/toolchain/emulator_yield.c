/* Preloaded into the emulator's process: lets its waiting threads wait.

   The emulator has a thread for each engine of the chip, and each looks for work by taking and releasing a
   mutex again and again. With more threads than processor cores, the one that has work waits for its turn
   behind those that have none, tens of milliseconds at each hand-over. Here a thread that has released
   mutexes many times steps aside for a moment. Nothing that is computed changes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#define TURNS 200

int pthread_mutex_unlock(pthread_mutex_t *mutex)
{
    static int (*original)(pthread_mutex_t *);
    static __thread unsigned turns;
    static const struct timespec moment = {0, 1000};
    int result;

    if (!original)
        original = (int (*)(pthread_mutex_t *))dlsym(RTLD_NEXT, "pthread_mutex_unlock");
    result = original(mutex);
    if (++turns % TURNS == 0)
        nanosleep(&moment, 0);
    return result;
}
