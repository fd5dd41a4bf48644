/* Makes writes to files slow in one process, as a busy disk would:

       cc -shared -fPIC -o slow_disk.so slow_disk.c
       LD_PRELOAD=./slow_disk.so COMMAND

   20 ms a write, and 2 MB a second; 0.3 s a sync. Pipes stay fast. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static void wait_for(int file, size_t bytes, useconds_t least) {
    struct stat about;
    if (fstat(file, &about) == 0 && S_ISREG(about.st_mode))
        usleep(least + bytes / 2);
}

ssize_t write(int file, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    wait_for(file, size, 20000);
    return real(file, data, size);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    ssize_t (*real)(int, const void *, size_t, off64_t) =
        dlsym(RTLD_NEXT, "pwrite64");
    wait_for(file, size, 20000);
    return real(file, data, size, offset);
}

int fsync(int file) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    wait_for(file, 0, 300000);
    return real(file);
}
