// The tables of activations and losses once more, for one number at a time, in float or double.
//
//     Activation<id, T>::f(z)                 f(z)
//     Activation<id, T>::df(z, h)             f'(z), where h = f(z)
//     Activation<id, T>::slope_from_output    whether df reads h alone: z need not be kept
//
//     Loss<id, T>::value_and_grad(h, y, g)    one output's share of the loss; g becomes its dE/dh
//
// Softmax cross entropy needs all outputs of a sample together: SoftmaxCrossEntropy has its steps.
// The answers are those of activations.py and losses.py, whose reasons are not given again; ids
// are in the order of those tables, and a test holds the formulas to them, on the whole extended
// line. A comparison with nan is false: the branches are chosen so that nan passes.

#pragma once

#include "device.cuh"

enum Activations { IDENTITY, SIGMOID, TANH, RELU, LEAKY_RELU, ELU, SOFTPLUS, SILU, GELU_TANH };

enum Losses {
  SQUARED_ERROR,
  ABSOLUTE_ERROR,
  HUBER,
  POISSON,
  BINARY_CROSS_ENTROPY,
  SOFTMAX_CROSS_ENTROPY
};

template <class T>
DEVICE T clip(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// exp(x). In float the product with log2(e) is rounded once more, which is as much as the rounding
// of x itself: good under a logistic function, where a sum of products stands in the exponent.
DEVICE float exponential(float x) { return ex2(1.44269504f * x); }
DEVICE double exponential(double x) { return exp(x); }

// 1 / (1 + exp(-z)), right at both ends, where the exponential is 0 or inf.
DEVICE float logistic(float z) { return rcp(1 + exponential(-z)); }
DEVICE double logistic(double z) { return 1 / (1 + exponential(-z)); }

// max(z, 0) + log(1 + exp(-|z|))
template <class T>
DEVICE T softplus(T z) {
  return maximum(z, T(0)) + log1p(exp(-fabs(z)));
}

// Activations -----------------------------------------------------------------------------------

template <int id, class T>
struct Activation;

template <class T>
struct Activation<IDENTITY, T> {
  static constexpr bool slope_from_output = true;
  static DEVICE T f(T z) { return z; }
  static DEVICE T df(T z, T h) { return 1; }
};

template <class T>
struct Activation<SIGMOID, T> {
  static constexpr bool slope_from_output = true;
  static DEVICE T f(T z) { return logistic(z); }
  static DEVICE T df(T z, T h) { return h - h * h; }  // one fused multiply-add
};

template <class T>
struct Activation<TANH, T> {
  static constexpr bool slope_from_output = true;
  static DEVICE T f(T z) { return tanh(z); }
  static DEVICE T df(T z, T h) { return 1 - h * h; }
};

template <class T>
struct Activation<RELU, T> {
  static constexpr bool slope_from_output = true;
  static DEVICE T f(T z) { return maximum(z, T(0)); }
  static DEVICE T df(T z, T h) { return h > 0 ? 1 : 0; }
};

template <class T>
struct Activation<LEAKY_RELU, T> {
  static constexpr bool slope_from_output = true;
  static constexpr T slope = 0.01;
  static DEVICE T f(T z) { return z > 0 ? z : slope * z; }
  static DEVICE T df(T z, T h) { return h > 0 ? T(1) : slope; }
};

template <class T>
struct Activation<ELU, T> {
  static constexpr bool slope_from_output = true;
  static DEVICE T f(T z) { return z > 0 ? z : expm1(z); }
  static DEVICE T df(T z, T h) { return h > 0 ? T(1) : h + 1; }
};

template <class T>
struct Activation<SOFTPLUS, T> {
  static constexpr bool slope_from_output = false;
  static DEVICE T f(T z) { return softplus(z); }
  static DEVICE T df(T z, T h) { return logistic(z); }
};

// z s(z), with s the logistic function. Within the limit exp(-z) is finite, and 1 - s = exp(-z) s
// keeps its digits where s rounds to 1; beyond it s is 0 or 1.
template <class T>
struct Activation<SILU, T> {
  static constexpr bool slope_from_output = false;
  static constexpr T limit = sizeof(T) == 4 ? 87 : 708;
  static DEVICE T f(T z) { return maximum(z, -limit) * logistic(clip(z, -limit, limit)); }
  static DEVICE T df(T z, T h) {
    const T x = clip(z, -limit, limit), s = logistic(x);
    return s + x * s * (exponential(-x) * s);
  }
};

// z s(u(z)); the limit is where u has that of SILU.
template <class T>
struct Activation<GELU_TANH, T> {
  static constexpr bool slope_from_output = false;
  static constexpr T limit = sizeof(T) == 4 ? 10 : 21, scale = 1.5957691216057308, cubic = 0.044715;
  static DEVICE T u(T x) { return scale * x * (1 + cubic * x * x); }
  static DEVICE T f(T z) { return maximum(z, -limit) * logistic(u(clip(z, -limit, limit))); }
  static DEVICE T df(T z, T h) {
    const T x = clip(z, -limit, limit), s = logistic(u(x));
    return s + x * s * (exponential(-u(x)) * s) * (scale * (1 + 3 * cubic * x * x));
  }
};

// Losses ----------------------------------------------------------------------------------------

template <int id, class T>
struct Loss;

template <class T>
struct Loss<SQUARED_ERROR, T> {
  static DEVICE T value_and_grad(T h, T y, T& g) {
    const T r = h - y;
    g = 2 * r;
    return r * r;
  }
};

template <class T>
struct Loss<ABSOLUTE_ERROR, T> {
  static DEVICE T value_and_grad(T h, T y, T& g) {
    const T r = h - y;
    g = r > 0 ? T(1) : r < 0 ? T(-1) : r;
    return fabs(r);
  }
};

template <class T>
struct Loss<HUBER, T> {
  static DEVICE T value_and_grad(T h, T y, T& g) {
    const T r = h - y;
    g = clip(r, T(-1), T(1));
    return g * (r - g / 2);
  }
};

template <class T>
struct Loss<POISSON, T> {
  static DEVICE T value_and_grad(T h, T y, T& g) {
    const T rate = exp(h);
    g = rate - y;
    return rate - y * h;
  }
};

template <class T>
struct Loss<BINARY_CROSS_ENTROPY, T> {
  static DEVICE T value_and_grad(T h, T y, T& g) {
    g = logistic(h) - y;
    return (maximum(h, T(0)) - y * h) + log1p(exp(-fabs(h)));
  }
};

// Of a sample: m = max h_k, total = sum exp(h_k - m), y_sum = sum y_k. Then per output:
struct SoftmaxCrossEntropy {
  template <class T>
  static DEVICE T value(T h, T y, T m, T total) {
    return y == 0 ? T(0) : y * (log(total) - (h - m));
  }
  template <class T>
  static DEVICE T grad(T h, T y, T m, T total, T y_sum) { return y_sum * (exp(h - m) / total) - y; }
};

// The weight of a class in the target of a sample that is given as a label. A label that is no
// class makes the sample nan.
template <class T>
DEVICE T class_weight(long long label, int k, int n_classes) {
  const T outside = label < 0 || label >= n_classes ? T(nanf("")) : T(0);
  return label == k ? T(1) : outside;
}
