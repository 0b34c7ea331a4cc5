"""From raw completions to scored episodes: parse, reject, deduplicate, judge relevance, mix the reward."""
