#!/bin/sh
# Slurm on this machine alone, with two nodes node1 and node2, for tests/launchers/rehearse.py. For a throw-away machine:
# it writes /etc/slurm/slurm.conf and /etc/hosts. As root, on Debian 12, after
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
set -eu
here=/tmp/slurm-rehearsal
mkdir -p "$here/state" "$here/spool-node1" "$here/spool-node2" /run/munge
chown munge /run/munge
grep -q node1 /etc/hosts || echo "127.0.0.1 node1 node2" >> /etc/hosts
cat > /etc/slurm/slurm.conf <<END
ClusterName=rehearsal
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
ReturnToService=2
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool-%n
SlurmctldPidFile=$here/slurmctld.pid
SlurmdPidFile=$here/slurmd-%n.pid
SlurmctldLogFile=$here/slurmctld.log
SlurmdLogFile=$here/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
runuser -u munge -- munged --force
slurmctld
slurmd -N node1
slurmd -N node2
sleep 3
sinfo
