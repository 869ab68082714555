"""Short stories without end, from a small grammar: text with real choices in it, to learn and to measure on.

Which word comes next is often open, as in any text, so a model's next-token distribution is worth comparing;
the stories of one seed are never those of another.
"""

from __future__ import annotations

import random

_ENGLISH = {
    "story": (
        "One {time} {a_hero} {went} {place}. {pronoun} {met} {a_friend} and {asked}. {reply} {end}",
        "There was {a_hero} who {lived} {place}. Every {time} {pronoun_low} {did}. {end}",
        "{a_hero_cap} and {a_friend} {went} {place}. It was {weather}, so they {did}. {end}",
        "{a_hero_cap} {found} {a_thing} near {place}. {pronoun} gave it to {a_friend}, who {did}. {end}",
    ),
    "time": ("morning", "evening", "day", "night", "summer", "winter"),
    "hero": ("cat", "dog", "child", "robot", "fox", "bird", "baker", "teacher", "fisherman", "small chip"),
    "adjective": ("old", "young", "happy", "tired", "brave", "quiet", "hungry", "clever"),
    "went": ("walked to", "ran to", "sailed to", "went slowly to", "came back to"),
    "lived": ("lived near", "slept in", "worked in", "sang in"),
    "found": ("found", "lost and found", "saw", "bought"),
    "place": (
        "the river",
        "the market",
        "the forest",
        "a white house",
        "the sea",
        "the school",
        "a cold hill",
    ),
    "met": ("met", "saw", "heard", "waited for"),
    "asked": ("asked for bread", "asked the way home", "told a joke", "said nothing", "counted to three"),
    "reply": (
        "The answer was yes.",
        "The answer was no.",
        "They both laughed.",
        "Nobody answered.",
        "Then it began to rain.",
    ),
    "did": (
        "drank some tea",
        "read a long book",
        "looked at the stars",
        "made a small fire",
        "wrote a letter",
        "sang an old song",
    ),
    "weather": ("raining", "very cold", "warm and bright", "windy", "already dark"),
    "thing": ("key", "lamp", "map", "letter", "red ball", "gold coin"),
    "end": (
        "In the end they were friends.",
        "That night everybody slept well.",
        "And so the day was over.",
        "Nobody knows what happened next.",
        "They never forgot it.",
    ),
}
_CHINESE = {
    "story": (
        "有一{time}，{hero}{went}{place}，遇见了{friend}。{reply}{end}",
        "{hero}住在{place}，每{time}都{did}。{end}",
        "{hero}在{place}找到了{thing}，把它送给{friend}。{reply}{end}",
        "{hero}和{friend}一起{went}{place}。天气{weather}，他们就{did}。{end}",
    ),
    "time": ("天", "天早上", "天晚上", "年夏天", "年冬天"),
    "hero": ("小猫", "小狗", "孩子", "机器人", "狐狸", "老师", "小芯片"),
    "friend": ("小鸟", "老人", "朋友", "小熊", "邻居"),
    "went": ("走到", "跑到", "回到", "慢慢走到"),
    "place": ("河边", "市场", "森林", "海边", "学校", "山上"),
    "did": ("喝茶", "看书", "看星星", "写信", "唱歌"),
    "weather": ("很冷", "很好", "下雨了", "已经黑了"),
    "thing": ("一把钥匙", "一盏灯", "一张地图", "一封信", "一个红球"),
    "reply": ("他们都笑了。", "谁也没有说话。", "他说好。", "他说不好。"),
    "end": ("最后他们成了朋友。", "那天晚上大家都睡得很好。", "后来的事谁也不知道。"),
}


def _noun(chance: random.Random) -> str:
    adjective, noun = chance.choice(_ENGLISH["adjective"]), chance.choice(_ENGLISH["hero"])
    return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {noun}"


def story(chance: random.Random) -> str:
    """One story, in English or in Chinese."""
    chinese = chance.random() < 0.35
    grammar = _CHINESE if chinese else _ENGLISH
    words = {key: chance.choice(values) for key, values in grammar.items()}
    if not chinese:
        hero, pronoun = _noun(chance), chance.choice(("He", "She", "It"))
        words |= {
            "a_hero": hero,
            "a_hero_cap": hero.capitalize(),
            "a_friend": _noun(chance),
            "a_thing": f"a {words['thing']}",
            "pronoun": pronoun,
            "pronoun_low": pronoun.lower(),
        }
    return words["story"].format(**words)


def text(seed: int, count: int) -> str:
    """*count* stories, a line each."""
    chance = random.Random(seed)
    return "".join(story(chance) + "\n" for _ in range(count))


#: The stories that are kept out of training, to measure on: ``heldout.txt`` holds these.
HELD_OUT = {"seed": 987_654, "count": 60}
