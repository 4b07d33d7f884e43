# shellcheck shell=bash
# The environment of the ranks on one node, for the launchers to source:
#
#   source launch/env.sh && share_cores 8
#
# Sets only what is not set yet, so a value of yours wins. Nothing else is needed: llama_tp itself keeps single-node
# traffic on the loopback interface and takes its time limits from flags.

# Cores this process may use: its affinity mask, and the container's quota if there is one. Python's cpu_count sees
# neither, and ranks with more threads than cores wait for each other in every layer.
n_cores() {
    local n quota period
    n=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)  # nproc would answer OMP_NUM_THREADS
    if [[ -r /sys/fs/cgroup/cpu.max ]]; then
        read -r quota period < /sys/fs/cgroup/cpu.max
        if [[ $quota != max ]] && (( quota / period < n )); then
            n=$(( quota < period ? 1 : quota / period ))
        fi
    fi
    echo "$n"
}

# share_cores RANKS: each of the RANKS on this node gets its share of the cores as threads.
share_cores() {
    local threads=$(( $(n_cores) / $1 ))
    : "${LLAMA_TP_THREADS:=$(( threads > 0 ? threads : 1 ))}"
    : "${OMP_NUM_THREADS:=$LLAMA_TP_THREADS}"  # unset, torchrun makes it 1 and prints a banner
    export LLAMA_TP_THREADS OMP_NUM_THREADS
}

# On several nodes with more than one network, name the one between them, or the ranks may wait for each other for ever
# on one that does not connect (NCCL and gloo choose by themselves):
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# To see why NCCL does what it does (not for every day: it prints a lot):
#   export NCCL_DEBUG=INFO
