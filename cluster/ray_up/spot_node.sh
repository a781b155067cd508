#!/bin/bash
# Starts Ray on a spot node and drains it when the cloud reclaims the node: `spot_node.sh aws|gcp RAY_START_OPTIONS...`
#
# The cloud's metadata server announces it, AWS two minutes and Google half a minute before. On SIGTERM `ray start --block`
# tells the cluster that the node will leave; the worker group then saves a checkpoint and continues without it. On other
# nodes nothing is ever announced, and this is just `ray start`.
set -u
cloud=$1; shift
server=${METADATA_SERVER:-http://169.254.169.254}
seconds=${POLL_S:-2}
case $cloud in
  aws) drain_s=100 ;;
  gcp) drain_s=20 ;;
  *) echo "spot_node.sh: $cloud: expected aws or gcp" >&2; exit 2 ;;
esac
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-$drain_s}

leaves() {
  if [ "$cloud" = aws ]; then
    local token
    token=$(wget -q -O - --timeout=2 --tries=1 --method=PUT --header='X-aws-ec2-metadata-token-ttl-seconds: 60' \
      "$server/latest/api/token") || return 1
    # 404 until there is a notice.
    wget -q -O - --timeout=2 --tries=1 --header="X-aws-ec2-metadata-token: $token" \
      "$server/latest/meta-data/spot/instance-action" > /dev/null
  else
    [ "$(wget -q -O - --timeout=2 --tries=1 --header='Metadata-Flavor: Google' \
      "$server/computeMetadata/v1/instance/preempted")" = TRUE ]
  fi
}

ray start --block "$@" &
ray=$!
trap 'kill -TERM $ray' TERM INT
while kill -0 $ray 2> /dev/null; do
  if leaves; then
    echo "$cloud reclaims this node: draining it"
    kill -TERM $ray
    break
  fi
  sleep "$seconds" & wait $!
done
wait $ray
status=$?
# A trapped signal ends the first wait before Ray has ended.
while kill -0 $ray 2> /dev/null; do wait $ray; status=$?; done
exit $status
