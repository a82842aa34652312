/* Preloaded library that counts the file operations of a process below one folder and, at the n-th, kills the process
 * or makes the operation fail. It stands between the process and libc: what Python, Rust and C++ write is seen alike;
 * what is written through mmap, or
 * by system calls without libc (the rename of safetensors' writer), is not.
 *
 * Operations: open (that creates, cuts or writes), write, truncate, fsync, rename, unlink, mkdir, link; with `reads`,
 * in their place, open and read of what is only read. Each is written to a log: number, kind, inode, size, path.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
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

enum Action { NOTHING, KILL_BEFORE, KILL_MIDWAY, KILL_AFTER, FAIL, FAIL_ON, SHORT, SHORT_ON };
/* FAIL: once. FAIL_ON: this one and all later ones that need space. SHORT: half of a write is done, the next operation
 * fails. SHORT_ON: the same, and all later ones that need space fail. */

static char below[PATH_MAX];
static size_t below_length;
static int log_file = -1, action, error, reads;
static long at;
static atomic_long count;
static atomic_int broken;

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

static int inside(const char* path) {
  return below_length && !strncmp(path, below, below_length) && (path[below_length] == '/' || !path[below_length]);
}

/* Whether a path is below the folder; its absolute form to `out`. */
static int tracked(int folder, const char* path, char* out) {
  if (!below_length || !path) return 0;
  if (path[0] == '/')
    snprintf(out, PATH_MAX, "%s", path);
  else {
    char link[64], base[PATH_MAX];
    if (folder == AT_FDCWD)
      snprintf(link, sizeof link, "/proc/self/cwd");
    else
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
    if (n < 0) return 0;
    base[n] = 0;
    if (strlen(base) + strlen(path) + 2 > PATH_MAX) return 0;
    strcat(strcat(strcpy(out, base), "/"), path);
  }
  return inside(out);
}

static int tracked_file(int file, char* out) {
  char link[64];
  if (!below_length || file < 0 || file == log_file) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
  if (n < 0) return 0;
  out[n] = 0;
  return inside(out);
}

static void note(long number, const char* kind, const char* path) {
  char line[2 * PATH_MAX];
  struct stat s = {0};
  if (log_file < 0) return;
  if (lstat(path, &s)) memset(&s, 0, sizeof s);
  int n = snprintf(line, sizeof line, "%ld\t%s\t%lu\t%ld\t%s\n", number, kind, (unsigned long)s.st_ino, (long)s.st_size,
                   path);
  if (syscall(SYS_write, log_file, line, n) < 0) die();
}

struct Turn {
  long number;
  int fail, half, kill;
};

/* What is to become of an operation. */
static struct Turn turn(const char* kind, const char* path, int needs_space) {
  struct Turn t = {atomic_fetch_add(&count, 1) + 1, 0, 0, 0};
  if (at && t.number == at) {
    int is_write = !strcmp(kind, "write");
    if (action == KILL_BEFORE) {
      note(t.number, "killed", path);
      die();
    }
    t.kill = action == KILL_AFTER || (action == KILL_MIDWAY && !is_write);
    t.half = is_write && (action == KILL_MIDWAY || action == SHORT || action == SHORT_ON);
    t.fail = action == FAIL || action == FAIL_ON || ((action == SHORT || action == SHORT_ON) && !is_write);
    if (action == FAIL_ON || action == SHORT_ON) atomic_store(&broken, 1);
  } else if (broken && needs_space)
    t.fail = 1;
  else if (at && action == SHORT && t.number == at + 1)
    t.fail = 1;
  if (t.fail) {
    note(t.number, "failed", path);
    errno = error;
  }
  return t;
}

static void after(struct Turn t, const char* kind, const char* path) {
  int kept = errno;
  note(t.number, kind, path);
  if (t.kill) die();
  errno = kept;
}

void arm_file_operations(const char* folder, const char* log, long number, int what, int code, int only_reads) {
  if (log_file >= 0) syscall(SYS_close, log_file);
  log_file = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  at = number, action = what, error = code, reads = only_reads;
  atomic_store(&broken, 0), atomic_store(&count, 0);
  snprintf(below, sizeof below, "%s", folder);
  below_length = strlen(below);
}

/* FILE_OPERATIONS=folder:log:number:action:errno:reads, of this process alone. */
__attribute__((constructor)) static void of_environment(void) {
  char *plan = getenv("FILE_OPERATIONS"), folder[PATH_MAX], log[PATH_MAX];
  long number;
  int what, code, only_reads;
  if (plan && sscanf(plan, "%4095[^:]:%4095[^:]:%ld:%d:%d:%d", folder, log, &number, &what, &code, &only_reads) == 6)
    arm_file_operations(folder, log, number, what, code, only_reads);
  unsetenv("FILE_OPERATIONS");
}

#define RUN(kind, path, needs_space, failed, call) \
  do {                                             \
    struct Turn t = turn(kind, path, needs_space); \
    if (t.fail) return failed;                     \
    long result = (call);                          \
    after(t, kind, path);                          \
    return result;                                 \
  } while (0)

static int open_at(int folder, const char* name, int flags, mode_t mode) {
  char path[PATH_MAX];
  int writes = (flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY;
  if (flags & O_DIRECTORY || writes == reads || !tracked(folder, name, path))
    return (int)syscall(SYS_openat, folder, name, flags, mode);
  RUN("open", path, flags & O_CREAT, -1, syscall(SYS_openat, folder, name, flags, mode));
}

#define MODE                                                 \
  mode_t mode = 0;                                           \
  if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) { \
    va_list list;                                            \
    va_start(list, flags);                                   \
    mode = va_arg(list, mode_t);                             \
    va_end(list);                                            \
  }
int open(const char* name, int flags, ...) { MODE return open_at(AT_FDCWD, name, flags, mode); }
int open64(const char* name, int flags, ...) { MODE return open_at(AT_FDCWD, name, flags, mode); }
int openat(int folder, const char* name, int flags, ...) { MODE return open_at(folder, name, flags, mode); }
int openat64(int folder, const char* name, int flags, ...) { MODE return open_at(folder, name, flags, mode); }
int creat(const char* name, mode_t mode) { return open_at(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char* name, mode_t mode) { return creat(name, mode); }

static FILE* open_stream(const char* symbol, const char* name, const char* mode) {
  FILE* (*real)(const char*, const char*) = (FILE * (*)(const char*, const char*)) dlsym(RTLD_NEXT, symbol);
  char path[PATH_MAX];
  int writes = strpbrk(mode, "wa+") != NULL;
  if (writes == reads || !tracked(AT_FDCWD, name, path)) return real(name, mode);
  struct Turn t = turn("open", path, writes);
  if (t.fail) return NULL;
  FILE* result = real(name, mode);
  after(t, "open", path);
  return result;
}
FILE* fopen(const char* name, const char* mode) { return open_stream("fopen", name, mode); }
FILE* fopen64(const char* name, const char* mode) { return open_stream("fopen64", name, mode); }

#define WRITE(file, size, all, part)                      \
  char path[PATH_MAX];                                    \
  if (reads || !tracked_file(file, path)) return (all);   \
  struct Turn t = turn("write", path, 1);                 \
  if (t.fail) return -1;                                  \
  ssize_t result = t.half && (size) > 1 ? (part) : (all); \
  t.kill |= t.half && action == KILL_MIDWAY;              \
  after(t, "write", path);                                \
  return result

ssize_t write(int file, const void* data, size_t size) {
  WRITE(file, size, syscall(SYS_write, file, data, size), syscall(SYS_write, file, data, size / 2));
}
ssize_t pwrite(int file, const void* data, size_t size, off_t place) {
  WRITE(file, size, syscall(SYS_pwrite64, file, data, size, place), syscall(SYS_pwrite64, file, data, size / 2, place));
}
ssize_t pwrite64(int file, const void* data, size_t size, off_t place) { return pwrite(file, data, size, place); }
ssize_t writev(int file, const struct iovec* parts, int number) {
  size_t size = 0;
  for (int i = 0; i < number; i++) size += parts[i].iov_len;
  int first = 0;
  while (first < number - 1 && !parts[first].iov_len) first++;
  WRITE(file, size, syscall(SYS_writev, file, parts, number),
        syscall(SYS_write, file, parts[first].iov_base, (parts[first].iov_len + 1) / 2));
}
ssize_t sendfile(int to, int from, off_t* place, size_t size) {
  WRITE(to, size, syscall(SYS_sendfile, to, from, place, size), syscall(SYS_sendfile, to, from, place, size / 2));
}
ssize_t sendfile64(int to, int from, off_t* place, size_t size) { return sendfile(to, from, place, size); }
ssize_t copy_file_range(int from, off_t* a, int to, off_t* b, size_t size, unsigned flags) {
  WRITE(to, size, syscall(SYS_copy_file_range, from, a, to, b, size, flags),
        syscall(SYS_copy_file_range, from, a, to, b, size / 2, flags));
}

ssize_t read(int file, void* data, size_t size) {
  char path[PATH_MAX];
  if (!reads || !tracked_file(file, path)) return syscall(SYS_read, file, data, size);
  RUN("read", path, 0, -1, syscall(SYS_read, file, data, size));
}
ssize_t pread64(int file, void* data, size_t size, off_t place) {
  char path[PATH_MAX];
  if (!reads || !tracked_file(file, path)) return syscall(SYS_pread64, file, data, size, place);
  RUN("read", path, 0, -1, syscall(SYS_pread64, file, data, size, place));
}
ssize_t pread(int file, void* data, size_t size, off_t place) { return pread64(file, data, size, place); }

#define OF_FILE(kind, file, call)                             \
  char path[PATH_MAX];                                        \
  if (reads || !tracked_file(file, path)) return (int)(call); \
  RUN(kind, path, 1, -1, call)
int fsync(int file) { OF_FILE("fsync", file, syscall(SYS_fsync, file)); }
int fdatasync(int file) { OF_FILE("fsync", file, syscall(SYS_fdatasync, file)); }
int ftruncate(int file, off_t size) { OF_FILE("truncate", file, syscall(SYS_ftruncate, file, size)); }
int ftruncate64(int file, off_t size) { return ftruncate(file, size); }
int posix_fallocate(int file, off_t start, off_t size) {
  char path[PATH_MAX];
  if (reads || !tracked_file(file, path)) return syscall(SYS_fallocate, file, 0, start, size) ? errno : 0;
  RUN("truncate", path, 1, error, syscall(SYS_fallocate, file, 0, start, size) ? errno : 0);
}
int posix_fallocate64(int file, off_t start, off_t size) { return posix_fallocate(file, start, size); }

#define OF_NAME(kind, folder, name, needs_space, call)           \
  char path[PATH_MAX];                                           \
  if (reads || !tracked(folder, name, path)) return (int)(call); \
  RUN(kind, path, needs_space, -1, call)
int truncate(const char* name, off_t size) {
  OF_NAME("truncate", AT_FDCWD, name, 0, syscall(SYS_truncate, name, size));
}
int unlinkat(int folder, const char* name, int flags) {
  OF_NAME("unlink", folder, name, 0, syscall(SYS_unlinkat, folder, name, flags));
}
int unlink(const char* name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char* name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
int mkdirat(int folder, const char* name, mode_t mode) {
  OF_NAME("mkdir", folder, name, 1, syscall(SYS_mkdirat, folder, name, mode));
}
int mkdir(const char* name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }
int symlinkat(const char* target, int folder, const char* name) {
  OF_NAME("link", folder, name, 1, syscall(SYS_symlinkat, target, folder, name));
}
int symlink(const char* target, const char* name) { return symlinkat(target, AT_FDCWD, name); }
int linkat(int a, const char* from, int b, const char* to, int flags) {
  OF_NAME("link", b, to, 1, syscall(SYS_linkat, a, from, b, to, flags));
}
int link(const char* from, const char* to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
  OF_NAME("rename", b, to, 0, syscall(SYS_renameat2, a, from, b, to, flags));
}
int renameat(int a, const char* from, int b, const char* to) { return renameat2(a, from, b, to, 0); }
int rename(const char* from, const char* to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
