#!/usr/bin/env bash
# A run on the GPUs of this machine, or of several (on each, from the same folder), by torchrun:
#
#   tools/launch/torchrun.sh bat-pretrain recipe=as2m hardware=ddp
#   NODES=2 HEAD=host0:29500 tools/launch/torchrun.sh bat-pretrain recipe=as2m hardware=fsdp
#
# PROCESSES: how many here (default: the GPUs). SIGTERM, SIGINT or SIGUSR1 to this script: the run
# saves and the exit code is 75, the same command continues it. (torchrun's own code would be 1, and
# its own SIGTERM leaves the processes 30 seconds.)
set -u
case ${1:-} in
  bat-pretrain) module=bat.cli.pretrain ;;
  bat-finetune) module=bat.cli.finetune ;;
  *) echo "usage: $0 bat-pretrain|bat-finetune key=value ..." >&2; exit 2 ;;
esac
shift
where=(--standalone)
[ "${NODES:-1}" -gt 1 ] &&
  where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-id "${RUN:-bat}"
         --rdzv-endpoint "${HEAD:?the first machine, host:port}")

python -c '
import sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
try:
    run.main(sys.argv[1:])
except ChildFailedError as error:
    sys.exit(max(error.get_first_failure()[1].exitcode, 1))
' "${where[@]}" --nproc-per-node "${PROCESSES:-gpu}" -m "$module" "$@" hardware.num_nodes=0 &
launcher=$!

save() {
  for child in $(cat /proc/$launcher/task/*/children); do kill -USR1 "$child"; done
}
trap save TERM INT USR1
while :; do
  wait $launcher
  code=$?
  kill -0 $launcher 2>/dev/null || exit $code # a signal ends "wait" early
done
