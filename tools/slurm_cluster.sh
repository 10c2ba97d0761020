#!/usr/bin/env bash
# A real Slurm cluster on this machine, to try jobs on and to break nodes of: one controller and NODES=2 nodes.
#   tools/slurm_cluster.sh up                      as root; installs Debian's packages when they are missing
#   eval "$(tools/slurm_cluster.sh env)"           then sbatch, squeue and scontrol talk to it
#   tools/slurm_cluster.sh status
#   tools/slurm_cluster.sh run srun -N 2 hostname  a command inside: srun, started outside, cannot be called back
#   sbatch --partition=urgent ...                  a job that takes the place of others when it needs their nodes
#   tools/slurm_cluster.sh kill-node 2             pulls the plug: all its processes die at once
#   tools/slurm_cluster.sh hang-node 2             freezes them; thaw-node 2 lets them go on
#   tools/slurm_cluster.sh kill-slurmd 2           the node's daemon alone: its tasks live on
#   tools/slurm_cluster.sh restart-node 2          boots it, after either
#   tools/slurm_cluster.sh kill-controller         and start-controller
#   tools/slurm_cluster.sh down                    leaves nothing behind but the packages
# NODES=3 CPUS=4 BOX=/var/lib/megachat-slurm choose its size (CPUs are only claimed) and its folder, one for each cluster.
#
# The cluster lives in a PID namespace, each node in one inside it: when the first process of a namespace dies, the
# kernel kills the others. The daemons listen on 127.0.0.1 alone: Slurm listens where the host's name points, so the
# host is called `localhost` in there; its nodes are called 127.0.0.1, 127.0.0.2 ...: names that resolve anywhere.
set -euo pipefail
self=$(readlink -f "$0")
# Where root alone can make a folder: not in /tmp. Nor in /run, from which systemd lets nobody execute a batch script.
BOX=${BOX:-/var/lib/megachat-slurm} NODES=${NODES:-2} CPUS=${CPUS:-4}
PATH=$PATH:/usr/sbin
export BOX NODES CPUS SLURM_CONF=$BOX/slurm.conf
packages=(slurmctld slurmd slurm-client munge)

fail() { echo "slurm_cluster.sh: $*" >&2; exit 1; }
# The process outside, and the first process inside, of the namespace that a file of $BOX names.
first() { local child; read -r child < "/proc/$1/task/$1/children"; echo "$child"; }
inside() { nsenter --target "$(first "$(box_pid)")" --uts --pid --mount "$@"; }
# A node's process numbers are those of the box.
in_node() {
    local node=$1
    shift
    inside sh -c 'read -r first < /proc/$0/task/$0/children; exec nsenter --target "$first" --pid --mount "$@"' \
        "$(<"$BOX/node-$node.pid")" "$@"
}
# Root works on nothing that another user could have put there, nor on a folder that is no cluster's.
ours() { [[ -d $BOX && ! -L $BOX && $(stat -c %u "$BOX") == 0 ]] && grep -qsx ClusterName=box "$SLURM_CONF"; }
# When a process began: its number may be a stranger's by now.
born() {
    local stat
    { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return
    read -ra stat <<< "${stat##*) }"
    echo "${stat[19]}"
}
remember() { echo "$1 $(born "$1")" > "$BOX/box.pid"; }
up() {
    local pid start
    ours && [[ -f $BOX/box.pid ]] && read -r pid start < "$BOX/box.pid" && [[ $start && $(born "$pid") == "$start" ]]
}
box_pid() { local pid _; read -r pid _ < "$BOX/box.pid"; echo "$pid"; }
must_be_up() { up || fail "no cluster in $BOX; \`$0 up\` starts one"; }

check() {                               # why there can be none here, if so
    [[ $EUID == 0 ]] || fail "it needs root: its daemons get PID namespaces of their own"
    local found daemon package new=()
    for found in /etc/slurm*/slurm.conf /run/slurm/conf/slurm.conf; do
        [[ ! -e $found ]] || fail "this machine belongs to a cluster, by $found"
    done
    for daemon in slurmd slurmctld; do
        ! runs "$daemon" || fail "this machine belongs to a cluster: $daemon runs"
    done
    if ! type slurmctld slurmd sbatch munged >/dev/null 2>&1; then
        type apt-get >/dev/null 2>&1 || fail "Slurm is not installed, and there is no apt-get to install ${packages[*]} with"
        ! runs munged || fail "Slurm is not installed, and munged runs: installing it might end that"
        for package in "${packages[@]}"; do
            [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == *" installed" ]] || new+=("$package")
        done
        export DEBIAN_FRONTEND=noninteractive
        apt-get -qq update >/dev/null 2>&1 || true
        apt-get -qq install -y --no-install-recommends "${packages[@]}" >/dev/null ||
            fail "Slurm is not installed, and apt-get could not install ${packages[*]}"
        # Debian starts what it installs; ours are others. What was there before is not ours to stop.
        for package in "${new[@]}"; do
            systemctl disable --now "$package" >/dev/null 2>&1 || service "$package" stop >/dev/null 2>&1 || true
        done
    fi
    unshare --uts --pid --mount-proc --fork --kill-child true || fail "this root may not make namespaces"
}
# Whether a daemon runs outside of all boxes.
runs() { pgrep --ns $$ --nslist pid -x "$1" >/dev/null 2>&1; }

configure() {
    if [[ -e $BOX || -L $BOX ]]; then
        [[ -d $BOX && ! -L $BOX && $(stat -c %u "$BOX") == 0 ]] || fail "$BOX is not a folder of root's"
        ours || [[ -z $(ls -A "$BOX") ]] || fail "$BOX holds something else than a cluster"
        chmod 755 "$BOX"
    else
        mkdir -m 755 "$BOX"
    fi
    mkdir -p "$BOX/state"
    (umask 077; head -c 128 /dev/urandom > "$BOX/munge.key")
    local nodes ports port
    nodes=$(seq -s, -f '127.0.0.%g' "$NODES")
    ports=$(python3 - $((NODES + 1)) <<'PY'
import socket, sys
listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(listener.getsockname()[1] for listener in listeners), sep=",")
PY
    )
    port=${ports%%,*}
    # The host's cgroups are not for nodes that share it. The plugin for version 1 only looks at them when asked to.
    local plugin=cgroup/v1
    [[ $(slurmd -V) =~ \ ([0-9]+)\.([0-9]+) ]] && (( BASH_REMATCH[1] * 100 + BASH_REMATCH[2] >= 2405 )) && plugin=disabled
    echo "CgroupPlugin=$plugin" > "$BOX/cgroup.conf"
    cat > "$SLURM_CONF" <<CONF
ClusterName=box
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# cred_expire is also how long a requeued job waits: two minutes if not said, five seconds at least.
AuthInfo=socket=$BOX/munge.sock,cred_expire=5
StateSaveLocation=$BOX/state
SlurmdSpoolDir=$BOX/spool-%n
SlurmctldPidFile=$BOX/slurmctld.pid
SlurmdPidFile=$BOX/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# $CPUS CPUs a node, whatever this machine has.
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
# A node that does not answer for so many seconds is down; one that answers again is up.
SlurmdTimeout=6
ReturnToService=2
MessageTimeout=5
KillWait=3
UnkillableStepTimeout=15
MinJobAge=3600
# A job's number decides on which port its ranks meet: two boxes on one machine must not agree on it.
FirstJobId=$((RANDOM % 12000 + 1))
# A job in \`urgent\` takes the place of others: asked to stop, they have the grace time, and wait.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
NodeName=$nodes NodeHostname=localhost NodeAddr=127.0.0.1 Port=${ports#*,} CPUs=$CPUS
CONF
}

# What the namespaces' first processes do: they start daemons, and go on reaping when those are gone.
box() {
    hostname localhost
    cd "$BOX"
    munged --foreground --force --key-file="$BOX/munge.key" --socket="$BOX/munge.sock" --num-threads=2 \
        --pid-file="$BOX/munged.pid" --log-file="$BOX/munged.log" --seed-file="$BOX/munge.seed" &
    while [[ ! -S $BOX/munge.sock ]]; do sleep 0.05; done
    controller &
    local node
    for node in $(seq "$NODES"); do boot "$node"; done
    sleep infinity &
    wait
}
controller() { exec slurmctld -D; }
boot() {
    setsid unshare --pid --mount-proc --fork --kill-child "$self" node "$1" </dev/null >>"$BOX/box.log" 2>&1 &
    echo $! > "$BOX/node-$1.pid"
}
node() {
    mkdir -p "$BOX/spool-127.0.0.$1"
    # Not killed with the daemon: slurmd re-reads its name from here when it starts again.
    slurmd -D -N "127.0.0.$1" &
    echo $! > "$BOX/slurmd-$1.inner"
    sleep infinity &
    wait
}
serve() {                               # in the foreground: dies with its parent
    configure
    remember $$                         # exec keeps the number
    exec setpriv --pdeathsig KILL unshare --uts --pid --mount-proc --fork --kill-child "$self" box \
        </dev/null >>"$BOX/box.log" 2>&1
}
idle() { timeout 5 sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l; }
wait_until_idle() {
    local until=$((SECONDS + 60))
    while (( SECONDS < until )); do
        (( $(idle) >= NODES )) && return
        sleep 0.1
    done
    tail -n 30 "$BOX/box.log" >&2
    fail "Slurm does not start; the end of $BOX/box.log is above"
}

command=${1:-help}
shift || true
case $command in
check) check ;;
up)
    up && fail "one is up already in $BOX; \`$0 down\` ends it"
    check
    configure
    setsid unshare --uts --pid --mount-proc --fork --kill-child "$self" box </dev/null >>"$BOX/box.log" 2>&1 &
    remember $!
    wait_until_idle
    sinfo -N >&2
    echo "export SLURM_CONF=$SLURM_CONF" ;;
serve) serve ;;
box) box ;;
node) node "$1" ;;
env) echo "export SLURM_CONF=$SLURM_CONF" ;;
status) must_be_up; sinfo -N -l; squeue ;;
run) must_be_up; inside "$@" ;;
kill-node) must_be_up; inside kill -KILL "$(<"$BOX/node-$1.pid")" ;;
# -1: everything in the namespace but its first process, which only waits. The program `kill` would say it failed.
hang-node) must_be_up; in_node "$1" bash -c "kill -STOP -1" ;;
thaw-node) must_be_up; in_node "$1" bash -c "kill -CONT -1" ;;
kill-slurmd) must_be_up; in_node "$1" kill -KILL "$(<"$BOX/slurmd-$1.inner")" ;;
restart-node)
    must_be_up
    inside kill -KILL "$(<"$BOX/node-$1.pid")" 2>/dev/null || true
    inside "$self" boot "$1" ;;
boot) boot "$1" ;;
kill-controller) must_be_up; inside kill -KILL "$(<"$BOX/slurmctld.pid")" ;;
start-controller) must_be_up; inside setsid --fork "$self" controller </dev/null >>"$BOX/box.log" 2>&1 ;;
controller) controller ;;
down)
    [[ -e $BOX || -L $BOX ]] || exit 0
    ours || fail "$BOX is not a cluster's folder; nothing was removed"
    if up; then
        kill -KILL "$(box_pid)"
        while up; do sleep 0.05; done
    fi
    rm -rf "$BOX" ;;
*) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$self"; [[ $command == help ]] ;;
esac
