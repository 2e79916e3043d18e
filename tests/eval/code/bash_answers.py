"""Forty answers to problems in bash, written by hand: twenty right, and one wrong in turn with each."""

from __future__ import annotations

ANSWERS = {
    "HumanEval_3_below_zero": (
        "    local b=0 x\n    for x in $1; do b=$((b + x)); [ $b -lt 0 ] && echo true && return; done\n    echo false",
        "    local b=0 x\n    for x in $1; do b=$((b + x)); done\n    [ $b -lt 0 ] && echo true || echo false",
    ),
    "HumanEval_5_intersperse": (
        '    local out="" x\n    for x in $1; do out="$out${out:+ $2 }$x"; done\n    echo "$out"',
        '    local out="" x\n    for x in $1; do out="$out$x $2 "; done\n    echo "$out"',
    ),
    "HumanEval_8_sum_product": (
        '    local s=0 p=1 x\n    for x in $1; do s=$((s + x)); p=$((p * x)); done\n    echo "$s $p"',
        '    local s=0 p=0 x\n    for x in $1; do s=$((s + x)); p=$((p * x)); done\n    echo "$s $p"',
    ),
    "HumanEval_9_rolling_max": (
        '    local m="" out="" x\n    for x in $1; do { [ -z "$m" ] || [ $x -gt $m ]; } && m=$x; out="$out $m"; done\n'
        '    echo "${out# }"',
        '    echo "$1" | tr " " "\\n" | sort -n | tail -1',
    ),
    "HumanEval_11_string_xor": (
        "    local i out=''\n    for ((i = 0; i < ${#1}; i++)); do out+=$((${1:i:1} ^ ${2:i:1})); done\n    echo $out",
        "    local i out=''\n    for ((i = 0; i < ${#1}; i++)); do out+=$((${1:i:1} | ${2:i:1})); done\n    echo $out",
    ),
    "HumanEval_12_longest": (
        '    local best="" x\n    for x in $1; do [ ${#x} -gt ${#best} ] && best=$x; done\n    echo "${best:-None}"',
        '    local best="" x\n    for x in $1; do [ ${#x} -ge ${#best} ] && best=$x; done\n    echo "${best:-None}"',
    ),
    "HumanEval_13_greatest_common_divisor": (
        "    local a=$1 b=$2 t\n    while [ $b -ne 0 ]; do t=$((a % b)); a=$b; b=$t; done\n    echo $a",
        "    echo $(($1 < $2 ? $1 : $2))",
    ),
    "HumanEval_14_all_prefixes": (
        '    local i out=""\n    for ((i = 1; i <= ${#1}; i++)); do out="$out ${1:0:i}"; done\n    echo "${out# }"',
        '    local i out=""\n    for ((i = 1; i < ${#1}; i++)); do out="$out ${1:0:i}"; done\n    echo "${out# }"',
    ),
    "HumanEval_15_string_sequence": ("    seq -s ' ' 0 $1", "    seq -s ' ' 1 $1"),
    "HumanEval_16_count_distinct_characters": (
        "    echo -n \"$1\" | tr 'A-Z' 'a-z' | fold -w1 | sort -u | grep -c . || true",
        '    echo -n "$1" | fold -w1 | sort -u | grep -c . || true',
    ),
    "HumanEval_23_strlen": ('    echo "${#1}"', '    echo "$1" | wc -c'),
    "HumanEval_24_largest_divisor": (
        "    local d=$(($1 - 1))\n    while [ $(($1 % d)) -ne 0 ]; do d=$((d - 1)); done\n    echo $d",
        "    echo $(($1 / 2))",
    ),
    "HumanEval_25_factorize": ('    factor "$1" | cut -d: -f2 | xargs', '    factor "$1" | xargs'),
    "HumanEval_28_concatenate": ('    echo "${1// /}"', '    echo "$1"'),
    "HumanEval_30_get_positive": (
        '    local out="" x\n    for x in $1; do [ $x -gt 0 ] && out="$out $x"; done\n    echo "${out# }"',
        '    local out="" x\n    for x in $1; do [ $x -ge 0 ] && out="$out $x"; done\n    echo "${out# }"',
    ),
    "HumanEval_31_is_prime": (
        '    [ "$1" -lt 2 ] && { echo false; return; }\n    local d\n'
        "    for ((d = 2; d * d <= $1; d++)); do [ $(($1 % d)) -eq 0 ] && { echo false; return; }; done\n    echo true",
        "    [ $(($1 % 2)) -eq 1 ] && echo true || echo false",
    ),
    "HumanEval_34_unique": (
        "    echo \"$1\" | tr ' ' '\\n' | sort -nu | xargs",
        "    echo \"$1\" | tr ' ' '\\n' | uniq | xargs",
    ),
    "HumanEval_35_max_element": (
        "    echo \"$1\" | tr ' ' '\\n' | sort -n | tail -1",
        "    echo \"$1\" | tr ' ' '\\n' | sort | tail -1",
    ),
    "HumanEval_41_car_race_collision": ("    echo $(($1 * $1))", "    echo $(($1 * 2))"),
    "HumanEval_42_incr_list": (
        '    local out="" x\n    for x in $1; do out="$out $((x + 1))"; done\n    echo "${out# }"',
        '    local out="" x\n    for x in $1; do out="$out $((x + 1))"; done\n    echo "$out"',
    ),
}
