# Runs commands of docs/kubernetes.md and looks at what they print. Sourced by run.sh, after machines.sh.

fail() {
    echo "kubernetes: $*" >&2
    {
        kubectl get pods -A -o wide
        kubectl get events -A --sort-by=.lastTimestamp | tail -n 30
        for pod in $(kubectl -n ashlar get pods -o name); do
            echo "== $pod"
            kubectl -n ashlar logs "$pod" --all-containers --prefix --tail=20
        done
    } >"$logs/state" 2>&1 || true
    echo "kubernetes: what was there is in $logs/state" >&2
    echo "0 passed, 1 failed"
    exit 1
}

# The reader's shell, in a directory of its own beside the clone's `deploy`: jobs live there from one command to the next.
rm -rf "$work/desk"
mkdir "$work/desk"
ln -s "$PWD/deploy" "$work/desk/deploy"
coproc DESK { cd "$work/desk" && exec bash; }
exec 6<&"${DESK[0]}" 7>&"${DESK[1]}"
at_desk() { # COMMAND: what it prints is `output`, how it ends is `status`
    rm -f "$logs/output"
    printf '%s\n' "eval ${1@Q} >>${logs@Q}/output 2>&1 </dev/null; echo \$?" >&7
    read -r status <&6
    output=$(<"$logs/output")
}

desk() { # COMMAND: has to end well
    at_desk "$1"
    [ "$status" = 0 ] || fail "'$1' ended with $status: $output"
}

checked=0
# What NODE is in commands of the document, and on which one those are run that are for each node.
node=node-1
shell_node=node-1
# check LINE EXPECTED: runs a command of the document, after its prompt. Its output has to match an extended regular expression as a
# whole, without the last line break.
check() {
    local line=$1 expected=$2 command output status=0
    command=${line#* }
    command=${command//NODE/$node}
    echo "$line" >&2
    case $line in
    'node# '*) output=$(on_node "$shell_node" "$command" 2>&1 </dev/null) || status=$? ;;
    *) at_desk "$command" ;;
    esac
    printf '%s\n' "$output" | sed 's/^/    /' >&2
    [ "$status" = 0 ] || fail "'$line' ended with $status"
    [[ $output =~ ^($expected)$ ]] || fail "'$line' printed that, and not $expected"
    checked=$((checked + 1))
}
# section NAME EXPECTED...: all commands of a section, with what each has to print; `skip` leaves one out.
section() {
    local name=$1 line
    shift
    while IFS= read -r line; do
        [ "$#" -gt 0 ] || fail "'$name' of the document has a command that nothing is expected of: $line"
        [ "$1" = skip ] || check "$line" "$1"
        shift
    done < <("$here/document.sh" "$name")
    [ "$#" = 0 ] || fail "'$name' of the document has fewer commands than were expected"
}
# in_text COMMAND EXPECTED: a command that is in the document's text or tables, as it is there.
in_text() {
    grep -qF "\`$1\`" docs/kubernetes.md || fail "the document has no \`$1\`"
    check "\$ $1" "$2"
}

any='.*'
day='[A-Z][a-z]+ [A-Z][a-z]+ +[0-9]+ [0-9:]+ UTC [0-9]+'
break=$'\n'
rolled='.*(successfully rolled out|rolling update complete|roll out complete).*'

