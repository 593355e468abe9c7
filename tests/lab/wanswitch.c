/* wanswitch: an Ethernet switch whose every path has a bandwidth, a one-way delay and a loss rate.
 *
 * Each port is a TAP device in a network namespace of its own. A frame from port i to port j waits
 * for i's uplink, for the path (i, j), and for j's downlink (each a FIFO drained at its rate), then
 * for the path's delay, and is dropped with the path's loss rate or when a queue is full.
 *
 *   wanswitch NETNS...           the ports, in order; port k is tap `wan0` with MAC 02:00:00:00:00:k+1
 *
 * It prints `ready`, then obeys the lines of its standard input, and ends where that ends, so that it
 * cannot outlive its lab. Rates are Mbit/s (0: unlimited), delays ms, loss a fraction (1 cuts):
 *
 *   up PORT RATE
 *   down PORT RATE
 *   path FROM TO RATE DELAY LOSS
 *   report                       answered by a line per path with traffic
 *   sync                         ends each batch of lines; answered by `done`
 *
 * What is never named is unlimited. Delivered means written to the receiver's device.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX_PORTS = 64, MAX_FRAME = 9216 + 18, BURST = 64, TIMER = MAX_PORTS, CONTROL };
static const double QUEUE_SECONDS = 0.5; /* the backlog past which a queue drops its tail */
static const double QUEUE_FLOOR = 64e3;  /* ... but never under this many bytes */

struct queue { double bytes_per_s, free_at; };
struct path { struct queue queue; double delay_s, loss; uint64_t frames, bytes, dropped; };
struct frame { double due; uint64_t order; struct path *path; int port, length; unsigned char data[]; };

static int ports, tap[MAX_PORTS];
static struct queue up[MAX_PORTS], down[MAX_PORTS];
static struct path path[MAX_PORTS][MAX_PORTS];
static struct frame **heap; /* frames on their way, the earliest due first */
static size_t heap_size, heap_room;
static uint64_t order;

static void die(const char *what) {
    fprintf(stderr, "wanswitch: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static int open_tap(const char *netns) {
    char name[256];
    snprintf(name, sizeof name, "/run/netns/%s", netns);
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    int there = open(name, O_RDONLY | O_CLOEXEC);
    if (home < 0 || there < 0 || setns(there, CLONE_NEWNET)) die(name);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq request = {.ifr_name = "wan0", .ifr_flags = IFF_TAP | IFF_NO_PI};
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request)) die("/dev/net/tun");
    if (setns(home, CLONE_NEWNET)) die("back home");
    close(home);
    close(there);
    return fd;
}

/* When the last byte leaves the queue, or -1 where the frame finds it full. */
static double through(struct queue *q, double at, int length) {
    if (q->bytes_per_s <= 0) return at;
    double backlog = (q->free_at - at) * q->bytes_per_s, room = q->bytes_per_s * QUEUE_SECONDS;
    if (backlog > (room > QUEUE_FLOOR ? room : QUEUE_FLOOR)) return -1;
    q->free_at = (q->free_at > at ? q->free_at : at) + length / q->bytes_per_s;
    return q->free_at;
}

static int before(const struct frame *a, const struct frame *b) {
    return a->due < b->due || (a->due == b->due && a->order < b->order);
}

static void push(struct frame *f) {
    if (heap_size == heap_room) {
        heap_room = heap_room ? 2 * heap_room : 1024;
        if (!(heap = realloc(heap, heap_room * sizeof *heap))) die("heap");
    }
    size_t i = heap_size++;
    for (; i && before(f, heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = f;
}

static struct frame *pop(void) {
    struct frame *top = heap[0], *last = heap[--heap_size];
    size_t i = 0, child;
    for (; (child = 2 * i + 1) < heap_size; i = child) {
        if (child + 1 < heap_size && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], last)) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return top;
}

static void forward(int from, int to, const unsigned char *data, int length, double at) {
    struct path *p = &path[from][to];
    if ((p->loss > 0 && drand48() < p->loss) || (at = through(&up[from], at, length)) < 0 ||
        (at = through(&p->queue, at, length)) < 0 || (at = through(&down[to], at, length)) < 0) {
        p->dropped++;
        return;
    }
    struct frame *f = malloc(sizeof *f + length);
    if (!f) die("frame");
    *f = (struct frame){.due = at + p->delay_s, .order = order++, .path = p, .port = to, .length = length};
    memcpy(f->data, data, length);
    push(f);
}

static void take(int from, double at) {
    unsigned char data[MAX_FRAME];
    for (int burst = 0; burst < BURST; burst++) {
        int length = read(tap[from], data, sizeof data);
        if (length < 14) return;
        int to = data[5] - 1;
        if (data[0] & 1) { /* broadcast: who has this address? */
            for (to = 0; to < ports; to++)
                if (to != from) forward(from, to, data, length, at);
        } else if (data[0] == 2 && to >= 0 && to < ports && to != from) forward(from, to, data, length, at);
    }
}

static void deliver(double at) {
    while (heap_size && heap[0]->due <= at) {
        struct frame *f = pop();
        if (f->path->loss < 1 && write(tap[f->port], f->data, f->length) == f->length) {
            f->path->frames++;
            f->path->bytes += f->length;
        } else f->path->dropped++; /* cut while on its way, or the receiver's device is down or full */
        free(f);
    }
}

static void print_report(void) {
    for (int i = 0; i < ports; i++)
        for (int j = 0; j < ports; j++) {
            struct path *p = &path[i][j];
            if (p->frames || p->dropped)
                printf("path %d %d frames %" PRIu64 " bytes %" PRIu64 " dropped %" PRIu64 "\n",
                       i, j, p->frames, p->bytes, p->dropped);
        }
}

static int is_port(int i) { return i >= 0 && i < ports; }

static void obey(const char *line) {
    int i, j;
    double rate, delay, loss;
    if (!strcmp(line, "report")) print_report();
    else if (!strcmp(line, "sync")) { printf("done\n"); fflush(stdout); }
    else if (sscanf(line, "up %d %lf", &i, &rate) == 2 && is_port(i)) up[i].bytes_per_s = rate * 125e3;
    else if (sscanf(line, "down %d %lf", &i, &rate) == 2 && is_port(i)) down[i].bytes_per_s = rate * 125e3;
    else if (sscanf(line, "path %d %d %lf %lf %lf", &i, &j, &rate, &delay, &loss) == 5 && is_port(i) &&
             is_port(j)) {
        path[i][j].queue.bytes_per_s = rate * 125e3;
        path[i][j].delay_s = delay / 1e3;
        path[i][j].loss = loss;
    } else {
        fprintf(stderr, "wanswitch: not understood: %s\n", line);
        exit(1);
    }
}

/* Obeys the whole lines that standard input has; false at its end. */
static int control(void) {
    static char text[4096];
    static size_t held;
    ssize_t got = read(STDIN_FILENO, text + held, sizeof text - 1 - held);
    if (got <= 0) return 0;
    text[held += got] = 0;
    char *line = text, *end;
    for (; (end = strchr(line, '\n')); line = end + 1) { *end = 0; obey(line); }
    memmove(text, line, held -= line - text);
    return 1;
}

static void watch(int poll, int fd, uint32_t as) {
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = as};
    if (epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event)) die("epoll");
}

static void set_alarm(int timer) {
    struct itimerspec when = {0};
    if (heap_size) {
        double due = heap[0]->due;
        when.it_value.tv_sec = (time_t)due;
        when.it_value.tv_nsec = (long)((due - (time_t)due) * 1e9) + 1;
        if (when.it_value.tv_nsec > 999999999) when.it_value.tv_nsec = 999999999;
    }
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, 0);
}

int main(int argc, char **argv) {
    if (argc < 2 || argc - 1 > MAX_PORTS) {
        fprintf(stderr, "usage: wanswitch NETNS...  (at most %d)\n", MAX_PORTS);
        return 2;
    }
    ports = argc - 1;
    int poll = epoll_create1(EPOLL_CLOEXEC);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    watch(poll, timer, TIMER);
    watch(poll, STDIN_FILENO, CONTROL);
    for (int i = 0; i < ports; i++) watch(poll, tap[i] = open_tap(argv[1 + i]), i);
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        set_alarm(timer);
        struct epoll_event events[MAX_PORTS + 2];
        int n = epoll_wait(poll, events, MAX_PORTS + 2, -1);
        double at = now();
        for (int e = 0; e < n; e++) {
            uint32_t who = events[e].data.u32;
            if (who == CONTROL) {
                if (!control()) return 0;
            } else if (who != TIMER) take(who, at);
        }
        deliver(now());
    }
}
