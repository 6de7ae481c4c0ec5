#!/bin/sh
# Makes what the C++ tests need available to CMake: GoogleTest and, for the SIMT harness, Boost.Context; Debian's
# packages, where we may install them.
set -eu

# need PACKAGE HEADER WHAT SKIPPED
need() {
  printf '#include <%s>\n' "$2" | ${CXX:-c++} -std=c++17 -fsyntax-only -x c++ - 2>/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing $1"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$1"; } >/dev/null
  else
    echo "$3 is missing, $4 will be skipped. To have them: sudo apt-get install $1" >&2
  fi
}

need libgtest-dev gtest/gtest.h GoogleTest "the C++ tests"
need libboost-context-dev boost/context/fiber.hpp Boost.Context "the CUDA kernels' tests in the SIMT harness"
