/* A CUDA driver that launches nothing: it prints the grid, the function and the arguments of each launch. */
#include <stdio.h>
#include <stdlib.h>

#define NOTHING(name) \
    int name(void) { return 0; }

NOTHING(cuInit)
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGet)
NOTHING(cuDeviceGetAttribute)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDriverGetVersion)
NOTHING(cuFuncGetAttribute)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuModuleGetFunction)
NOTHING(cuModuleLoadData)
NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuPointerGetAttribute)
NOTHING(cuPointerGetAttributes)
NOTHING(cuStreamIsCapturing)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)

int cuCtxGetCurrent(void **context) {
    *context = (void *)1;
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = "an error of the stub";
    return 0;
}

int cuLaunchKernelEx(const unsigned *config, void *function, void **params, void **extra) {
    printf("%u %u %u, %zu:", config[0], config[1], config[2], (size_t)function);
    for (int i = 0; i < atoi(getenv("STUB_PARAMS")); i++) printf(" %d", *(int *)params[i]);
    printf("\n");
    return fflush(stdout);
}
