#pragma once
#include <exception>
#include <string>
namespace gloo {
namespace transport {
// One connection to one peer.
class Pair {
 public:
  virtual ~Pair() = 0;
};
namespace tcp {
class Pair {
 public:
  // Fails what waits for this peer and closes the connection. Takes the pair's own lock.
  std::exception_ptr signalExceptionExternal(const std::string& message);
};
} // namespace tcp
} // namespace transport
} // namespace gloo
