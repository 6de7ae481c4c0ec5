#pragma once

#include <string>

#include <pybind11/pybind11.h>

// plan(op, device, **shape): what a call would cost, from the sizes alone.
pybind11::dict plan(const std::string& op, const std::string& device, const pybind11::kwargs& shape);
