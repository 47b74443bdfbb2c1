#!/usr/bin/env bash
# Play everything that docs/results.md says of simulated orders, and write what was printed beside this file. About an hour on two cores.
#
#   docs/results/simulate.sh TRACES        a folder with sessions.csv.gz and calls.jsonl.gz
#   python docs/results/tables.py          then write the tables
set -euo pipefail
traces=$1
cd "$(dirname "$0")/../.."
foreseen=${FORESEEN:-$traces/foreseen.jsonl.gz} # predictions, made once (ten minutes) and kept
calm="fcfs edf edf-demote maestro-paper-demote ours"
all="fcfs fcfs-run edf llf plas srtf boost qlm edf-demote maestro-paper maestro-paper-demote ours ours-no-prediction ours-no-dag \
    ours-no-deadline ours-no-demotion ours-oracle edf-demote-oracle maestro-paper-demote-oracle"
one=serving/deploy/fleet.sim-4xa100.toml

play() { # NAME "POLICIES" OPTIONS: play, and keep what was printed
    local name=$1 policies=() policy
    for policy in $2; do policies+=(--policy "$policy"); done
    shift 2
    maestro simulate "$traces/sessions.csv.gz" --calls "$traces/calls.jsonl.gz" --foreseen "$foreseen" "${policies[@]}" "$@" --json \
        >"docs/results/$name.json"
}

play simulate-contention-support "$all" --mix support --window 1200 --fleet $one --load 1.46 --seeds 5
play simulate-contention-coding "$all" --mix coding --window 1200 --fleet $one --load 1.535 --seeds 5
play simulate-contention-research "$all" --mix research --window 1200 --fleet $one --load 2.13 --seeds 5
play simulate-contention-fanout "$all" --mix fanout --window 1200 --fleet $one --load 1.61 --seeds 5
play simulate-calm "fcfs edf ours" --mix support --window 1200 --fleet $one --load 0.8 --seeds 3
play simulate-flood "fcfs edf ours" --mix support --window 1200 --fleet $one --load 0.8 --seeds 3 --flood tenant-1:6
play simulate-kv "ours ours-cap" --mix coding --window 1200 --fleet $one --load 1.0,1.5 --seeds 3
play simulate-models "ours ours-no-prewake lru qlm no-colocation" --mix everything --window 1200 \
    --fleet serving/deploy/fleet.sim-8models-4x40g.toml --load 0.5 --seeds 3
play simulate-clusters "ours ours-round-robin ours-least-loaded ours-nearest" --mix support --window 900 \
    --fleet serving/deploy/fleet.sim-3clusters.toml --load 0.9 --seeds 3 --outage near:300:600
for mix in support coding research fanout; do
    play "simulate-loads-$mix" "$calm" --mix "$mix" --window 900 --fleet $one --load 0.5,1.0,1.2 --seeds 2
done
play simulate-bursts "$calm" --mix support --window 3600 --fleet $one --load 0.8 --burst 2.0 --seeds 1
maestro bench scale --json >docs/results/scale.json
