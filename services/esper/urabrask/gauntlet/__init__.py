"""The gauntlet itself: runs in the sandbox alone, because it loads code that nobody has judged. Needs torch."""
