// The gloo declarations that ProcessGroupGloo.hpp needs: torch's wheel ships that header but not gloo's own. c10d's objects hold
// gloo's only behind pointers, so no layout is taken from here but two vtables' first entries; never construct or derive from one.
// The functions are gloo's own, exported by libtorch_cpu.so.
#pragma once
#include <chrono>
#include <memory>
#include <gloo/transport/pair.h>
namespace gloo {
class Context {
 public:
  void setTimeout(std::chrono::milliseconds);
  void closeConnections();
  std::unique_ptr<transport::Pair>& getPair(int rank);
};
} // namespace gloo
