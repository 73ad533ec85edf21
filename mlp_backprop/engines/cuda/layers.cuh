// The layers of a narrow net, known at compile time, and where their arrays lie:
//
//     SIZES, ACTIVATIONS    d_0, ..., d_L; L ids of formulas.cuh

#pragma once

#include "formulas.cuh"

constexpr int sizes[] = {SIZES}, activations[] = {ACTIVATIONS};
constexpr int L = sizeof(activations) / sizeof(int);

template <int l>
using Activated = Activation<activations[l - 1], float>;

// Where W_l begins.
DEVICE constexpr int place(int l) {
  int sum = 0;
  for (int k = 1; k < l; ++k) sum += sizes[k] * (sizes[k - 1] + 1);
  return sum;
}
constexpr int N_PARAMS = place(L + 1);

struct Pointers {
  struct {
    const float *W, *b;
  } layers[L];
};

struct Results {
  struct {
    float *W, *b;
  } layers[L];
  float* loss;
};
