#!/bin/bash
# A run on a Cloud TPU slice that is waited for: each worker starts the run when it boots. By hand: change the
# assignments, then `./queued-resource.sh`; the same again after a preemption. Filled in: `jaxlm launch tpu --queued`.
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
queue() {
    gcloud compute tpus queued-resources "$1" "$name" --project "$project" --zone "$zone" "${@:2}"
}
startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
{
    echo '#!/bin/bash'
    declare -p image nfs storage preflight train restarts
    cat << 'STARTUP'
printf -v check ' %q' jaxlm "${preflight[@]}"
printf -v run ' %q' jaxlm "${train[@]}"
mkdir -p "$storage"
mountpoint -q "$storage" || mount -t nfs "$nfs" "$storage"
gcloud auth configure-docker "${image%%/*}" --quiet
for ((started = 0; started <= restarts; started++)); do
    docker rm --force jaxlm 2> /dev/null
    docker run --name jaxlm --stop-timeout 300 --privileged --user 0 --network host \
        --volume "$storage:$storage" "$image" bash -c "$check && exec $run"
    code=$?
    echo "start $started: exit code $code"
    if [ $code -eq 0 ] || [ $code -eq 2 ]; then
        break
    fi
    sleep 30
done
STARTUP
} > "$startup"

state=$(queue describe --format 'value(state.state)' 2> /dev/null || echo MISSING)
case $state in
    MISSING) ;;
    SUSPENDED | FAILED) queue delete --quiet --force ;;
    *)
        echo "$name is $state already"
        exit 1
        ;;
esac
queue create --node-id "$name" --accelerator-type "$accelerator" --runtime-version "$runtime" "${capacity[@]}" \
    --metadata-from-file "startup-script=$startup"
echo "logs of worker 0: gcloud compute tpus tpu-vm ssh $name --project $project --zone $zone --worker 0 \\"
echo "    --command 'sudo docker logs --follow jaxlm'"
