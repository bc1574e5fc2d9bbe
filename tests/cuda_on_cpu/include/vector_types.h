// CUDA's small vectors, with their alignment: a uint4 is one 16-byte access.
#pragma once

#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

template <class T, int N>
struct cuda_vector;

template <class T>
struct alignas(2 * sizeof(T)) cuda_vector<T, 2> {
  T x, y;
};

template <class T>
struct alignas(4 * sizeof(T)) cuda_vector<T, 4> {
  T x, y, z, w;
};

using char2 = cuda_vector<signed char, 2>;
using char4 = cuda_vector<signed char, 4>;
using uchar2 = cuda_vector<unsigned char, 2>;
using uchar4 = cuda_vector<unsigned char, 4>;
using short2 = cuda_vector<short, 2>;
using short4 = cuda_vector<short, 4>;
using ushort2 = cuda_vector<unsigned short, 2>;
using ushort4 = cuda_vector<unsigned short, 4>;
using int2 = cuda_vector<int, 2>;
using int4 = cuda_vector<int, 4>;
using uint2 = cuda_vector<unsigned, 2>;
using uint4 = cuda_vector<unsigned, 4>;
using longlong2 = cuda_vector<long long, 2>;
using ulonglong2 = cuda_vector<unsigned long long, 2>;
using float2 = cuda_vector<float, 2>;
using float4 = cuda_vector<float, 4>;
using double2 = cuda_vector<double, 2>;

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
