# shellcheck shell=bash
set -euo pipefail
# Sourced by the job scripts in this folder: what all of them need from their environment.
# Slurm runs a copy of the script, so the repository is the folder it runs in, where sbatch was called.
#
# A cluster's own way to an environment stands in one file, site.sh in this folder or the one that
# ENDPROMPT_SITE names (empty: none); sites/ has examples.  It may change the environment, and set PYTHON and
#   launcher=(apptainer exec --nv IMAGE)    what every Python of a job is started through, on every node
root=$PWD
refuse() {
  echo "${SLURM_JOB_NAME:-slurm}: $*" >&2
  exit 2
}
for option in "$@"; do # the job's own; where its runs are, all its scripts ask the environment
  case $option in
    --o | --ou | --out | --o=* | --ou=* | --out=*)
      refuse "$option: the folder of all runs comes from the environment; leave it out, and set OUT=DIR" \
        "before sbatch" ;;
  esac
done
site_ended() { # instead of the job script: by its `exit`, or by a command that failed
  local code=$?
  trap - ERR EXIT
  refuse "$site ended with exit code $code${failed:+ ($failed)}; mend that file, or set" \
    "ENDPROMPT_SITE= to do without one"
}
RECIPE=${RECIPE:-$root/recipes/llama3-8b-64k.yaml} METHOD=${METHOD:-endprompt}
export OUT=${OUT:-$root/runs}

launcher=() site=${ENDPROMPT_SITE-} found=$(command -v python || true)
if [ -z "${ENDPROMPT_SITE+named}" ] && { [ -e slurm/site.sh ] || [ -L slurm/site.sh ]; }; then
  site=slurm/site.sh
fi
if [ -n "$site" ]; then
  if ! { [ -f "$site" ] && [ -r "$site" ]; }; then
    refuse "ENDPROMPT_SITE: there is no file $site to read (seen from $root); slurm/sites/ has examples"
  fi
  [[ $site == */* ]] || site=./$site # else bash looks in PATH first
  failed=''
  trap '[ "${BASH_SOURCE[0]}" != "$site" ] || failed="line $LINENO: $(sed -n "${LINENO}p" "$site")"' ERR
  trap site_ended EXIT
  set +u # what activates an environment often reads variables that nobody has set
  # shellcheck source=/dev/null
  source "$site"
  trap - ERR EXIT
  set -euo pipefail
  cd -- "$root"
fi
if [ ${#launcher[@]} -gt 0 ] && ! command -v -- "${launcher[0]}" >/dev/null; then
  refuse "launcher: there is no command '${launcher[0]}' on $(hostname); mend ${site:-slurm/site.sh}" \
    "(several words are an array: launcher=(apptainer exec IMAGE))"
fi

if [ -z "${PYTHON:-}" ]; then # what the site's file has brought, else the repository's own environment
  PYTHON=python
  own=$root/.venv/bin/python
  if [ ${#launcher[@]} -eq 0 ] && [ "$(command -v python || true)" = "$found" ] && [ -x "$own" ]; then
    PYTHON=$own
  fi
fi
export PYTHON
if [ ! -f "$RECIPE" ]; then
  refuse "RECIPE: there is no file $RECIPE; recipes/ holds the ones that come with the repository"
fi

in_job() { "${launcher[@]}" "$@"; }

# A job that cannot work ends here, not when it has waited for its GPUs and its ranks.
seen=$OUT
until [ -e "$seen" ]; do seen=$(dirname -- "$seen"); done
paths=()
for path in . "$RECIPE" "$seen"; do paths+=("$path" "$(stat -Lc %i -- "$path")"); done
probed=$(in_job "$PYTHON" -c "$(cat slurm/probe.py)" "$OUT" "${paths[@]}" 2>&1) \
  || refuse "'${launcher[*]:+${launcher[*]} }$PYTHON' on $(hostname): ${probed##*$'\n'};" \
    "mend ${site:-slurm/site.sh} or PYTHON (slurm/sites/ has examples)"
