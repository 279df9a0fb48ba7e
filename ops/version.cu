// What this library was built with: read by swat_jax/native.py before anything is registered.

#include "xla/ffi/api/c_api.h"

#define SWAT_QUOTE(x) #x
#define SWAT_TEXT(x) SWAT_QUOTE(x)

// A runtime refuses handlers of a newer minor version, and ends the backend with them.
extern "C" int swat_jax_ffi_api_minor() { return XLA_FFI_API_MINOR; }

extern "C" const char* swat_jax_build_info() {
  return "{\"version\": \"" SWAT_JAX_VERSION
         "\", \"cuda\": \"" SWAT_TEXT(__CUDACC_VER_MAJOR__) "." SWAT_TEXT(__CUDACC_VER_MINOR__)
         "\", \"architectures\": \"" SWAT_JAX_ARCHITECTURES "\"}";
}
