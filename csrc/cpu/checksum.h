// A checksum of memory, to tell whether packed weights are still those of a call. No torch
// header.
#pragma once

#include <cstdint>

namespace epsa::cpu {

// 64 bits of `bytes` bytes. It is as fast as memory is read: the products of 32-bit halves,
// summed in eight lanes, as in UMAC's NH (RFC 4418) and XXH3. It is no defence against
// an attacker, who could find other bytes of the same sum.
uint64_t checksum(const void* data, int64_t bytes, uint64_t seed);

}  // namespace epsa::cpu
