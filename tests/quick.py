"""Options with which every editor makes an edit of a small model in a moment: few steps, narrow, little plain text."""

_SOLVED = {"text": "tiny", "tokens": 400}
QUICK = {
    "alpha_edit": {**_SOLVED, "steps": 3, "contexts": 1},
    "calinet": {"steps": 3, "slots": 2},
    "calinet_trained": {"slots": 2},
    "ft_l": {"steps": 3},
    "grace": {"steps": 3},
    "ike": {"sources": {}},
    "instructedit": {"rank": 6, "edit_rate": 0.05},
    "loc_ft": {"steps": 3},
    "memit": {**_SOLVED, "steps": 3, "contexts": 1},
    "mend": {"rank": 6, "edit_rate": 0.05},
    "ridge_edit": {"text": "tiny", "tokens": 2000, "rank": 6, "edit_rate": 0.5},
    "rome": {**_SOLVED, "steps": 3, "contexts": 1},
    "scope_edit": {
        "text": "tiny",
        "tokens": 2000,
        "rank": 6,
        "edit_rate": 0.5,
        "embedding": 4,
        "token_embedding": 4,
        "competitors": 0,
        "relations": 2,
    },
    "serac": {"rank": 2, "embedding": 4},
    "t_patcher": {"steps": 10, "lr": 0.1, "m": 1.0, "text": "tiny", "memory": 100},
}
