/* Threads for loops whose parts are independent. The caller takes part, and never waits for a helper to arrive, only for parts that a
   helper has begun, and that go on where the caller waits if the helper has no core (cores.h): where other processes hold the other cores, a
   loop costs what it costs on one core, and not a time slice at a barrier (OpenMP's, at load 4 on 2 cores: 22 ms a step became 600).

   One pool in the process. A second caller at the same time runs its loop alone. */
#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cores.h"

typedef void (*loop_body)(void *context, long first, long last);

#define MOST_HELPERS 255
#define SPINS_OF_HELPER 20000 /* about 0.2 ms: longer than Python takes from one kernel to the next */
#define SPINS_OF_CALLER 2000
#define LOOK_NS 100000L /* from one look at the helpers that the caller waits for to the next */

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() (void)0
#endif

/* ticket: 16 bits of the loop's number, 24 of how many parts it has, 24 of the next part to take. Whoever moves it from a value with
   next < parts holds that part; the loop is over only when that part is done, so `body` and the rest still belong to it. */
static struct {
    pthread_mutex_t caller;
    _Atomic uint64_t ticket;
    _Atomic long parts_done;
    _Atomic int num_asleep;
    _Atomic uint32_t wake_count;
    _Atomic int caller_core;
    loop_body body;
    void *context;
    long count;
    int num_helpers;
    struct helper helpers[MOST_HELPERS];
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .caller_core = -1};

#define PARTS_OF(ticket) (long)((ticket) >> 24 & 0xffffff)
#define NEXT_OF(ticket) (long)((ticket)&0xffffff)

/* Takes parts until none is left; whether there was one. */
static int run_parts(void) {
    int has_run = 0;
    uint64_t ticket = atomic_load(&pool.ticket);
    while (NEXT_OF(ticket) < PARTS_OF(ticket)) {
        if (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) continue;
        long part = NEXT_OF(ticket), parts = PARTS_OF(ticket), count = pool.count;
        pool.body(pool.context, count * part / parts, count * (part + 1) / parts);
        atomic_fetch_add(&pool.parts_done, 1);
        has_run = 1;
        ticket = atomic_load(&pool.ticket);
    }
    return has_run;
}

static void *help(void *given) {
    struct helper *self = given;
    pthread_getcpuclockid(pthread_self(), &self->clock);
    atomic_store(&self->thread, (pid_t)syscall(SYS_gettid));
    for (int spins = 0;;) {
        int core = sched_getcpu();
        if (core == atomic_load(&pool.caller_core)) leave_core(self, core, pool.helpers, pool.num_helpers);
        uint64_t ticket = atomic_load(&pool.ticket);
        if (NEXT_OF(ticket) < PARTS_OF(ticket)) {
            atomic_store(&self->core, core);
            atomic_store(&self->has_work, 1);
            if (run_parts()) spins = 0;
            atomic_store(&self->has_work, 0);
        }
        if (++spins < SPINS_OF_HELPER) {
            PAUSE();
            continue;
        }
        uint32_t wake_count = atomic_load(&pool.wake_count);
        atomic_fetch_add(&pool.num_asleep, 1);
        ticket = atomic_load(&pool.ticket);
        if (NEXT_OF(ticket) >= PARTS_OF(ticket)) syscall(SYS_futex, &pool.wake_count, FUTEX_WAIT_PRIVATE, wake_count, NULL, NULL, 0);
        atomic_fetch_sub(&pool.num_asleep, 1);
        spins = 0;
    }
    return NULL;
}

/* A forked child has none of the threads. */
static void forget_helpers(void) {
    pool.num_helpers = 0;
    atomic_store(&pool.num_asleep, 0);
    pthread_mutex_init(&pool.caller, NULL);
}

/* Loops run on `threads` threads from now on, the caller's included, for the whole process. Returns how many there are. */
int use_threads(int threads) {
    static int is_first = 1;
    pthread_mutex_lock(&pool.caller);
    if (is_first) pthread_atfork(NULL, NULL, forget_helpers);
    is_first = 0;
    for (; pool.num_helpers + 1 < threads && pool.num_helpers < MOST_HELPERS; pool.num_helpers++) {
        struct helper *helper = &pool.helpers[pool.num_helpers];
        memset(helper, 0, sizeof *helper);
        atomic_store(&helper->core, -1);
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, 8 << 20);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &attributes, help, helper);
        pthread_attr_destroy(&attributes);
        if (failed) break;
    }
    int total = pool.num_helpers + 1;
    pthread_mutex_unlock(&pool.caller);
    return total;
}

/* Until the parts that helpers have begun are done. */
static void wait_for_parts(long parts) {
    for (long spins = 0; atomic_load(&pool.parts_done) < parts; spins++) {
        if (spins == SPINS_OF_CALLER) break;
        PAUSE();
    }
    if (atomic_load(&pool.parts_done) == parts) return;
    for (int i = 0; i < pool.num_helpers; i++) pool.helpers[i].seen_ns = -1;
    long looked_ns = 0;
    while (atomic_load(&pool.parts_done) < parts) {
        sched_yield();
        long now_ns = read_clock(CLOCK_MONOTONIC);
        if (now_ns - looked_ns < LOOK_NS) continue;
        looked_ns = now_ns;
        for (int i = 0; i < pool.num_helpers; i++)
            if (is_displaced(&pool.helpers[i])) fetch_helper(&pool.helpers[i]);
    }
    for (int i = 0; i < pool.num_helpers; i++) let_go(&pool.helpers[i]);
}

/* body(context, first, last) over [0, count) in about `parts_a_thread` parts a thread; `count` of 1 or a pool of 1 costs a call. */
static void run_loop(loop_body body, void *context, long count, long parts_a_thread) {
    long parts = parts_a_thread * (pool.num_helpers + 1);
    parts = parts < count ? parts : count;
    if (count <= 0) return;
    if (parts <= 1 || pool.num_helpers == 0 || pthread_mutex_trylock(&pool.caller)) {
        body(context, 0, count);
        return;
    }
    pool.body = body, pool.context = context, pool.count = count;
    atomic_store(&pool.parts_done, 0);
    atomic_store(&pool.caller_core, sched_getcpu());
    uint64_t number = ((atomic_load(&pool.ticket) >> 48) + 1) & 0xffff;
    atomic_store(&pool.ticket, number << 48 | (uint64_t)parts << 24);
    if (atomic_load(&pool.num_asleep)) {
        atomic_fetch_add(&pool.wake_count, 1);
        syscall(SYS_futex, &pool.wake_count, FUTEX_WAKE_PRIVATE, pool.num_helpers, NULL, NULL, 0);
    }
    run_parts();
    wait_for_parts(parts);
    pthread_mutex_unlock(&pool.caller);
}
