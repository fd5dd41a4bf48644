#!/usr/bin/env bash
# Sourced: quote, for what the launch scripts print as commands.

# Prints its arguments as one line that a shell reads back as the same words.
quote() {
    local word separator="" one="'" escaped="'\\''"
    for word in "$@"; do
        if [[ -z "$word" || "$word" == *[!A-Za-z0-9_./:=@%+,-]* ]]; then
            word="'${word//$one/$escaped}'"
        fi
        printf '%s%s' "$separator" "$word"
        separator=" "
    done
}
