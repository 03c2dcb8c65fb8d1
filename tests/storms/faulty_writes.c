/* A disk that fails, or that is remembered: stands before the C library's calls that write below one folder.

   Compiled and loaded by zygote.py (LD_PRELOAD). `faults_arm` begins anew: calls below `folder` are counted, and from
   the `nth` on (1: the first; 0: none) one fails with `code`, or all of them (`all`), as on a full disk; with `code` 0 the
   process prints the call and is killed before it. With a `stash`, what is done is appended to the file <stash>/log, a
   line a call, and each file that is made is kept there as well, by a second name: its number in the log. Reading is
   left alone.

   A stream's own writes do not pass through `write`; that is why the calls of stdio stand here, too. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define LONG 8192
#define KILLED "killed before " /* kills.py looks for it */
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char folder[LONG], stash[LONG], first[2 * LONG];
static long nth;
static int code, all, journal = -1;
static atomic_long calls, lines;

void faults_arm(const char *where, long at, int error, int every, const char *kept)
{
    snprintf(folder, LONG, "%s", where);
    snprintf(stash, LONG, "%s", kept);
    nth = at, code = error, all = every, first[0] = 0;
    calls = lines = 0;
    if (journal >= 0)
        syscall(SYS_close, journal);
    journal = -1;
    if (stash[0]) {
        char path[LONG + 8];
        snprintf(path, sizeof path, "%s/log", stash);
        journal = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    }
}

long faults_calls(void) { return calls; }

/* The first call that was made to fail: its name and path; empty if none was. */
const char *faults_first(void) { return first; }

static long note(const char *what, const char *path, const char *to, long size)
{
    long line = ++lines;
    if (journal >= 0) {
        char text[3 * LONG];
        int length = snprintf(text, sizeof text, "%ld\t%s\t%s\t%s\t%ld\n", line, what, path, to, size);
        syscall(SYS_write, journal, text, length);
    }
    return line;
}

/* A word of the program's own in the log: what it has reported. */
void faults_note(const char *word) { note("said", word, "", 0); }

static int below(const char *path)
{
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

/* The absolute path of a name (given to a call with a folder's descriptor); empty if it is unknown. */
static void place(int at, const char *name, char *path)
{
    char base[LONG] = "", link[64];
    if (name[0] != '/') {
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, base, LONG - 1);
        base[length > 0 ? length : 0] = 0;
    }
    snprintf(path, LONG, name[0] == '/' ? "%s%s" : "%s/%s", base, name);
}

static int of_descriptor(int descriptor, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, LONG - 1);
    path[length > 0 ? length : 0] = 0;
    return below(path);
}

/* Whether this call fails; counts it. `frees`: it takes no room on a disk, so that a full one lets it pass. */
static int fails(const char *what, const char *path, int frees)
{
    long call = ++calls;
    if (!nth || call < nth || (call > nth && !all) || (frees && code == ENOSPC))
        return 0;
    if (!first[0])
        snprintf(first, sizeof first, "%s %s", what, path);
    if (!code) {
        dprintf(2, KILLED "%s\n", first);
        kill(getpid(), SIGKILL);
    }
    errno = code;
    return 1;
}

static void made(const char *path)
{
    int kept = errno;
    long line = note("create", path, "", 0);
    if (journal >= 0) {
        char name[LONG + 32];
        snprintf(name, sizeof name, "%s/%ld", stash, line);
        syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, name, 0);
    }
    errno = kept;
}

static int exists(const char *path)
{
    int kept = errno, there = !syscall(SYS_faccessat, AT_FDCWD, path, F_OK);
    errno = kept;
    return there;
}

#define OPENING(name, at, file, flags, call)                                                                           \
    char path[LONG];                                                                                                   \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                                             \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode = va_arg(more, mode_t);                                                                                   \
        va_end(more);                                                                                                  \
    }                                                                                                                  \
    place(at, file, path);                                                                                             \
    int ours = (flags & (O_CREAT | O_WRONLY | O_RDWR)) && below(path), fresh = ours && !exists(path);                  \
    if (ours && fails("open", path, 0))                                                                                \
        return -1;                                                                                                     \
    int result = call;                                                                                                 \
    if (result >= 0 && fresh)                                                                                          \
        made(path);                                                                                                    \
    return result;

int open(const char *file, int flags, ...) { OPENING(open, AT_FDCWD, file, flags, NEXT(open)(file, flags, mode)) }
int open64(const char *file, int flags, ...) { OPENING(open64, AT_FDCWD, file, flags, NEXT(open64)(file, flags, mode)) }
int openat(int at, const char *file, int flags, ...)
{
    OPENING(openat, at, file, flags, NEXT(openat)(at, file, flags, mode))
}
int openat64(int at, const char *file, int flags, ...)
{
    OPENING(openat64, at, file, flags, NEXT(openat64)(at, file, flags, mode))
}

static FILE *opened(FILE *(*next)(const char *, const char *), const char *file, const char *mode)
{
    char path[LONG];
    place(AT_FDCWD, file, path);
    int ours = mode[strcspn(mode, "wa+")] && below(path), fresh = ours && !exists(path);
    if (ours && fails("fopen", path, 0))
        return NULL;
    FILE *result = next(file, mode);
    if (result && fresh)
        made(path);
    return result;
}

FILE *fopen(const char *file, const char *mode) { return opened(NEXT(fopen), file, mode); }
FILE *fopen64(const char *file, const char *mode) { return opened(NEXT(fopen64), file, mode); }

#define WRITING(what, descriptor, call)                                                                                \
    char path[LONG];                                                                                                   \
    int ours = of_descriptor(descriptor, path);                                                                        \
    if (ours && fails(what, path, 0))                                                                                  \
        return -1;                                                                                                     \
    __typeof__(call) result = call;                                                                                    \
    if (ours && result >= 0) {                                                                                         \
        struct stat status;                                                                                            \
        int kept = errno;                                                                                              \
        fstat(descriptor, &status);                                                                                    \
        note(what, path, "", status.st_size);                                                                          \
        errno = kept;                                                                                                  \
    }                                                                                                                  \
    return result;

ssize_t write(int d, const void *b, size_t n) { WRITING("write", d, NEXT(write)(d, b, n)) }
ssize_t pwrite(int d, const void *b, size_t n, off_t o) { WRITING("write", d, NEXT(pwrite)(d, b, n, o)) }
ssize_t pwrite64(int d, const void *b, size_t n, off64_t o) { WRITING("write", d, NEXT(pwrite64)(d, b, n, o)) }
ssize_t writev(int d, const struct iovec *v, int n) { WRITING("write", d, NEXT(writev)(d, v, n)) }
int ftruncate(int d, off_t n) { WRITING("truncate", d, NEXT(ftruncate)(d, n)) }
int ftruncate64(int d, off64_t n) { WRITING("truncate", d, NEXT(ftruncate64)(d, n)) }
int posix_fallocate(int d, off_t o, off_t n) { WRITING("allocate", d, NEXT(posix_fallocate)(d, o, n)) }
ssize_t sendfile(int d, int s, off_t *o, size_t n)
{
    WRITING("write", d, ((ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile"))(d, s, o, n))
}
ssize_t copy_file_range(int s, off64_t *o, int d, off64_t *p, size_t n, unsigned f)
{
    WRITING("write", d, NEXT(copy_file_range)(s, o, d, p, n, f))
}

#define SYNCING(descriptor, call)                                                                                      \
    char path[LONG];                                                                                                   \
    int ours = of_descriptor(descriptor, path);                                                                        \
    if (ours && fails("fsync", path, 0))                                                                               \
        return -1;                                                                                                     \
    struct stat status = {0};                                                                                          \
    fstat(descriptor, &status);                                                                                        \
    int result = call;                                                                                                 \
    if (ours && !result)                                                                                               \
        note("sync", path, "", status.st_size);                                                                        \
    return result;

int fsync(int d) { SYNCING(d, NEXT(fsync)(d)) }
int fdatasync(int d) { SYNCING(d, NEXT(fdatasync)(d)) }

size_t fwrite(const void *b, size_t size, size_t n, FILE *stream)
{
    char path[LONG];
    int ours = of_descriptor(fileno(stream), path);
    if (ours && fails("fwrite", path, 0))
        return 0;
    size_t result = NEXT(fwrite)(b, size, n, stream);
    if (ours && result)
        note("write", path, "", ftell(stream));
    return result;
}

int fflush(FILE *stream)
{
    char path[LONG];
    if (stream && of_descriptor(fileno(stream), path) && fails("fflush", path, 0))
        return EOF;
    return NEXT(fflush)(stream);
}

int fclose(FILE *stream)
{
    char path[LONG];
    int bad = of_descriptor(fileno(stream), path) && fails("fclose", path, 0);
    int result = NEXT(fclose)(stream);
    if (bad)
        errno = code;
    return bad ? EOF : result;
}

int close(int d)
{
    char path[LONG];
    struct stat status = {0}; /* of an empty file closing loses nothing */
    int writes = folder[0] && of_descriptor(d, path) && (fcntl(d, F_GETFL) & O_ACCMODE) != O_RDONLY;
    int bad = writes && !fstat(d, &status) && status.st_size && fails("close", path, 1);
    int result = NEXT(close)(d);
    if (bad)
        errno = code;
    return bad ? -1 : result;
}

#define NAMING(what, at, name, frees, call)                                                                            \
    char path[LONG];                                                                                                   \
    place(at, name, path);                                                                                             \
    int ours = below(path);                                                                                            \
    if (ours && fails(what, path, frees))                                                                              \
        return -1;                                                                                                     \
    int result = call;                                                                                                 \
    if (ours && !result)                                                                                               \
        note(what, path, "", 0);                                                                                       \
    return result;

int mkdir(const char *p, mode_t m) { NAMING("mkdir", AT_FDCWD, p, 0, NEXT(mkdir)(p, m)) }
int mkdirat(int d, const char *p, mode_t m) { NAMING("mkdir", d, p, 0, NEXT(mkdirat)(d, p, m)) }
int unlink(const char *p) { NAMING("unlink", AT_FDCWD, p, 1, NEXT(unlink)(p)) }
int rmdir(const char *p) { NAMING("rmdir", AT_FDCWD, p, 1, NEXT(rmdir)(p)) }
int remove(const char *p) { NAMING("unlink", AT_FDCWD, p, 1, NEXT(remove)(p)) }
int unlinkat(int d, const char *p, int f)
{
    NAMING(f & AT_REMOVEDIR ? "rmdir" : "unlink", d, p, 1, NEXT(unlinkat)(d, p, f))
}

#define RENAMING(what, from_at, from, to_at, to, call)                                                                 \
    char path[LONG], target[LONG];                                                                                     \
    place(from_at, from, path);                                                                                        \
    place(to_at, to, target);                                                                                          \
    int ours = below(target);                                                                                          \
    if (ours && fails(what, target, 0))                                                                                \
        return -1;                                                                                                     \
    int result = call;                                                                                                 \
    if (ours && !result)                                                                                               \
        note(what, path, target, 0);                                                                                   \
    return result;

int rename(const char *a, const char *b) { RENAMING("rename", AT_FDCWD, a, AT_FDCWD, b, NEXT(rename)(a, b)) }
int renameat(int d, const char *a, int e, const char *b) { RENAMING("rename", d, a, e, b, NEXT(renameat)(d, a, e, b)) }
int renameat2(int d, const char *a, int e, const char *b, unsigned f)
{
    RENAMING("rename", d, a, e, b, NEXT(renameat2)(d, a, e, b, f))
}
int link(const char *a, const char *b) { RENAMING("link", AT_FDCWD, a, AT_FDCWD, b, NEXT(link)(a, b)) }
int linkat(int d, const char *a, int e, const char *b, int f)
{
    RENAMING("link", d, a, e, b, NEXT(linkat)(d, a, e, b, f))
}
