// Threads that share work by taking pieces of it. Nobody waits for one who has not begun: whoever calls takes pieces like
// the others and, where they are late (asleep, or kept from a core by a neighbour), ends up with all of them. OpenMP's
// regions wait for their last thread, which two busy neighbours on two cores made twenty times slower.
#pragma once
#include <cstdint>

namespace stepladder {

using Piece = void (*)(void* work, int64_t begin, int64_t end) noexcept;

// How large a piece may be: large ones first, so that few are taken, small ones at the end, so that all end together. Above
// two they are even.
struct Sizes {
  int64_t least, most;
};

// Calls `piece(work, begin, end)` over [0, n) on up to `threads` threads; returns when all of it is done. Pieces must not care
// who computes them, nor in which order.
void take_turns(int64_t n, Sizes sizes, int threads, Piece piece, void* work);

}  // namespace stepladder
