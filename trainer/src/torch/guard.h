// No exception leaves a function that is called through ffi.rs: its class and its words do.
#pragma once
#include "shim.h"

#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/exception.h>

#include <cstdlib>
#include <cstring>
#include <typeinfo>

inline c10d_result failure(c10d_class of, const char* message) noexcept {
  return {of, strdup(message)};
}

template <class F>
c10d_result guard(F&& f) noexcept {
  try {
    f();
    return {C10D_OK, nullptr};
  } catch (const c10::OutOfMemoryError& e) {
    return failure(C10D_OUT_OF_MEMORY, e.what_without_backtrace());
  } catch (const c10::AcceleratorError& e) {
    return failure(C10D_DEVICE, e.what_without_backtrace());
  } catch (const c10d::TimeoutError& e) {
    return failure(C10D_TIMEOUT, e.what_without_backtrace());
  } catch (const c10::DistError& e) {
    return failure(C10D_PEER, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    return failure(C10D_HERE, e.what_without_backtrace());
  } catch (const std::exception& e) {
    // gloo throws its own types, all of them of connections, whose declarations are not ours.
    return failure(strncmp(typeid(e).name(), "N4gloo", 6) ? C10D_HERE : C10D_PEER, e.what());
  } catch (...) {
    return failure(C10D_HERE, "an exception of an unknown type");
  }
}

inline void drop(c10d_result result) {
  free(result.message);
}
