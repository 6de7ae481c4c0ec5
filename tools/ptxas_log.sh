#!/bin/sh
# A compiler launcher for nvcc: ptxas_log.sh COMPILER ARGUMENTS... runs it and keeps all it says in <object>.ptxas;
# what is not ptxas's report on a kernel (warnings, errors) is shown as well.
log=
previous=
for argument; do
  [ "$previous" = -o ] && log=$argument.ptxas
  previous=$argument
done
[ -n "$log" ] || exec "$@"

"$@" 2>"$log"
status=$?
grep -vE '^ptxas info +:|^ +[0-9]+ bytes stack frame, ' "$log" >&2
exit $status
