/* Which cores the threads of a loop run on. The kernel may wake a helper on its caller's core, if something else runs on the other one just
   then, and leaves it there for many steps: two threads that share a core take twice as long, while the other core may be free. So a helper
   that finds itself on its caller's core leaves it. And a helper that holds a part, but whose core another process has taken, is fetched to
   its caller's core, which does nothing but wait for that part. */
#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

/* `is_moving`: held by whoever changes where the helper may run. `has_work`: it holds a part, or is about to take one; it was on `core` then.
   `seen_ns`: its processor time when the caller last looked. */
struct helper {
    _Atomic pid_t thread;
    atomic_flag is_moving;
    _Atomic int has_work, core;
    clockid_t clock;
    cpu_set_t allowed;
    int is_fetched;
    long seen_ns;
};

static long read_clock(clockid_t clock) {
    struct timespec now;
    return clock_gettime(clock, &now) ? -1 : now.tv_sec * 1000000000L + now.tv_nsec;
}

/* By the helper itself, to a core that none of the loop's threads has, if it may use one. A core that a thread may not use any more it leaves
   at once. */
static void leave_core(struct helper *self, int core, struct helper *helpers, int num_helpers) {
    if (core < 0 || atomic_flag_test_and_set(&self->is_moving)) return;
    cpu_set_t allowed, others;
    if (!sched_getaffinity(0, sizeof allowed, &allowed)) {
        others = allowed;
        CPU_CLR(core, &others);
        for (int i = 0; i < num_helpers; i++)
            if (&helpers[i] != self) CPU_CLR(atomic_load(&helpers[i].core), &others);
        if (!CPU_COUNT(&others)) others = allowed;
        CPU_CLR(core, &others);
        if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others)) sched_setaffinity(0, sizeof allowed, &allowed);
    }
    atomic_flag_clear(&self->is_moving);
}

/* By the caller, who waits: whether the helper has work and has not run since the last look. It may be on this core already: then it is only
   kept here. */
static int is_displaced(struct helper *helper) {
    if (!atomic_load(&helper->has_work) || helper->is_fetched) return 0;
    long seen_ns = helper->seen_ns;
    helper->seen_ns = read_clock(helper->clock);
    return helper->seen_ns >= 0 && helper->seen_ns == seen_ns;
}

static void fetch_helper(struct helper *helper) {
    if (atomic_flag_test_and_set(&helper->is_moving)) return;
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET(sched_getcpu(), &here);
    pid_t thread = atomic_load(&helper->thread);
    if (sched_getaffinity(thread, sizeof helper->allowed, &helper->allowed) || sched_setaffinity(thread, sizeof here, &here)) {
        atomic_flag_clear(&helper->is_moving);
        return;
    }
    helper->is_fetched = 1;
}

/* Once its part is done. */
static void let_go(struct helper *helper) {
    if (!helper->is_fetched) return;
    sched_setaffinity(atomic_load(&helper->thread), sizeof helper->allowed, &helper->allowed);
    helper->is_fetched = 0;
    atomic_flag_clear(&helper->is_moving);
}
