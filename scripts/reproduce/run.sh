# Read by the scripts beside it, one a paper: options, and `run`, which hands one row's command to lmms-eval.

usage() {
    cat <<TEXT
usage: $0 [--dry-run] [PATTERN]

Runs lmms-eval for every row of the paper whose name matches PATTERN (a shell pattern, default all); then
  vidcompress table --paper PAPER --results \$RESULTS
--dry-run prints the commands and runs nothing. A row with results is not run again; one that was interrupted goes on
where it stopped.

Variables:
  RESULTS     folder of the results (default ./results)
  LAUNCH      what starts a module (default "python"; several GPUs: "accelerate launch --num_processes 8")
  BATCH       prompts answered together (default 1, which times need)
  TASKS       by comma; only these of a row's tasks
  MODEL_ARGS  more of lmms-eval's --model_args, such as attn_implementation=flash_attention_2
TEXT
}

dry_run=0
pattern='*'
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) usage >&2; exit 2 ;;
        *) pattern=$argument ;;
    esac
done

matched=0
trap '[ $? -ne 0 ] || [ $matched -gt 0 ] || { echo "no row matches $pattern${TASKS:+ with a task of $TASKS}; --dry-run lists all" >&2; exit 1; }' EXIT

# run NAME CHECKPOINT FRAMES TASKS [SETTINGS]
run() {
    local name=$1 folder=${RESULTS:-results}/$1 tasks=$4 arguments
    # shellcheck disable=SC2254
    case $name in $pattern) ;; *) return 0 ;; esac
    [ -z "${TASKS:-}" ] || tasks=$(comm -12 <(tr , '\n' <<< "$4" | sort) <(tr , '\n' <<< "$TASKS" | sort) | paste -sd,)
    [ -n "$tasks" ] || return 0
    matched=1
    arguments="pretrained=$2,max_num_frames=$3,record=$folder/record${5:+,$5}${MODEL_ARGS:+,$MODEL_ARGS}"
    local command=(${LAUNCH:-python} -m lmms_eval --model vidcompress --model_args "$arguments" --tasks "$tasks")
    command+=(--batch_size "${BATCH:-1}" --log_samples --output_path "$folder/${tasks//,/+}")
    if [ "$dry_run" = 1 ]; then
        echo "${command[*]}"
        return 0
    fi
    if [ -n "$(find "$folder/${tasks//,/+}" -name '*_results.json' 2> /dev/null)" ]; then
        echo "$name: has results for $tasks"
        return 0
    fi
    echo "$name: ${command[*]}"
    "${command[@]}"
    # lmms-eval ends with exit code 0 when an evaluation crashed; what counts is the file.
    if [ -z "$(find "$folder/${tasks//,/+}" -name '*_results.json' 2> /dev/null)" ]; then
        echo "$name: no results; what was answered is in $folder/record, and the next run goes on there" >&2
        exit 1
    fi
}
