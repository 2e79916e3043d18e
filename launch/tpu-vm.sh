#!/bin/bash
# A run on a Cloud TPU slice, watched from here: created if need be, started on all its workers, started again when it
# is preempted or fails. By hand: change the assignments, then `./tpu-vm.sh`. Filled in and checked: `jaxlm launch tpu`.
name=quickstart
project=my-project
zone=us-east5-a
accelerator=v5p-8
runtime=v2-alpha-tpuv5
capacity=()
image=us-docker.pkg.dev/my-project/jaxlm/jaxlm:tpu
nfs=10.0.0.2:/share
storage=/mnt/jaxlm
preflight=(launch preflight configs/quickstart.toml)
train=(train configs/quickstart.toml --resume)
restarts=20

set -euo pipefail
tpu() {
    gcloud compute tpus tpu-vm "$1" "$name" --project "$project" --zone "$zone" "${@:2}"
}
registry=${image%%/*}
words=(jaxlm "${preflight[@]}")
printf -v check ' %q' "${words[@]}"
words=(jaxlm "${train[@]}")
printf -v run ' %q' "${words[@]}"
printf -v docker ' %q' sudo docker run --rm --name jaxlm --stop-timeout 300 --privileged --user 0 --network host \
    --volume "$storage:$storage" "$image" bash -c "$check && exec $run"
printf -v worker '%s\n' "set -e" \
    "sudo mkdir -p $storage" \
    "mountpoint -q $storage || sudo mount -t nfs $nfs $storage" \
    "sudo gcloud auth configure-docker $registry --quiet" \
    "sudo docker rm --force jaxlm 2> /dev/null || true" \
    "exec$docker"

for ((started = 0; started <= restarts; started++)); do
    [ "$started" -eq 0 ] || sleep 30
    state=$(tpu describe --format 'value(state)' 2> /dev/null || echo MISSING)
    echo "start $started: $name is $state"
    if [ "$state" != READY ] && [ "$state" != MISSING ]; then
        tpu delete --quiet
        state=MISSING
    fi
    if [ "$state" = MISSING ]; then
        tpu create --accelerator-type "$accelerator" --version "$runtime" "${capacity[@]}" || continue
    fi
    code=0
    tpu ssh --worker all --command "$worker" || code=$?
    case $code in
        0) exit 0 ;;
        2)
            echo "exit code 2, a mistake to mend: not started again"
            exit 2
            ;;
        *) echo "exit code $code" ;;
    esac
done
echo "given up after $restarts restarts"
exit 1
