#define _GNU_SOURCE
#include <sys/syscall.h>

#include "cores.h"

static struct helper helpers[3];

static void be_helper(void) {
    helpers[0].thread = (pid_t)syscall(SYS_gettid);
    pthread_getcpuclockid(pthread_self(), &helpers[0].clock);
}

/* The calling thread leaves its core; `busy` is that of another helper. The core it is on then, or -1 where its mask has changed. */
int leave(int core, int busy) {
    cpu_set_t before, after;
    be_helper();
    atomic_store(&helpers[0].core, busy);  /* its own last core is no reason to stay away from it */
    atomic_store(&helpers[1].core, busy);
    atomic_store(&helpers[2].core, core);
    sched_getaffinity(0, sizeof before, &before);
    leave_core(&helpers[0], core, helpers, 3);
    int now = sched_getcpu();
    sched_getaffinity(0, sizeof after, &after);
    return CPU_EQUAL(&before, &after) ? now : -1;
}

/* The calling thread is a helper with a part, which does not run from now on. */
void begin_work(void) {
    be_helper();
    helpers[0].seen_ns = -1;
    atomic_store(&helpers[0].has_work, 1);
}

void end_work(void) { atomic_store(&helpers[0].has_work, 0); }
int look(void) { return is_displaced(&helpers[0]); }
void fetch(void) { fetch_helper(&helpers[0]); }
void release(void) { let_go(&helpers[0]); }
