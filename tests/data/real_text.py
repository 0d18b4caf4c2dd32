"""Real text, written for these tests: what tokenizers and cleaners must not damage, by kind."""
from __future__ import annotations

ENGLISH = [
    "The harbour was quiet in the early morning. Two fishermen mended their nets and talked about the price of diesel, "
    "while a dog slept between the crates.",
    "Nobody knew who had built the bridge. It was older than the town's records, and every engineer who had looked at it "
    "came to another conclusion about how it stood.",
    "If the measurement is repeated ten times, the mean comes closer to the true value; if it is repeated a thousand times, "
    "what remains is the error of the instrument.",
    "“It's 20 past 8,” she said, “and we've 1,234.50 euros left — that isn't much, is it?”",
]
CHINESE = [
    "清晨的港口很安静。两个渔夫一边补网,一边谈论柴油的价格,一只狗睡在木箱之间。",
    "没有人知道这座桥是谁修建的。它比镇上的档案还要古老,每一位看过它的工程师都得出不同的结论。",
    "如果把测量重复十次,平均值就会更接近真实值;如果重复一千次,剩下的就是仪器本身的误差。",
    "“现在是八点二十分,”她说,“我们还剩下1,234.50元——不算多,对吗?”",
]
CODE = [
    "def mean(values):\n    \"\"\"The arithmetic mean.\"\"\"\n    return sum(values) / len(values)\n",
    "for (int i = 0; i < n; ++i) {\n\tif (a[i] > limit) {\n\t\treturn -1;\n\t}\n}\n",
    "SELECT name, COUNT(*) AS n\nFROM harbour\nWHERE year >= 1998\nGROUP BY name;\r\n",
]
EMOJI = [
    "👩‍👩‍👧‍👦 and 👍🏽 and 🏳️‍🌈: one picture, many code points 😀😀",
    "🇨🇭🇯🇵 flags are pairs; ❤️ is two, e\u0301 is too",
]
RIGHT_TO_LEFT = [
    "בבוקר היה הנמל שקט. שני דייגים תיקנו את הרשתות ודיברו על מחיר הסולר.",
    "كان الميناء هادئًا في الصباح الباكر. أصلح صيادان شباكهما وتحدثا عن سعر الديزل.",
    "הכותרת \u202aHTTP 404\u202c נשארת כמו שהיא\u200f.",
]
KINDS = {"en": ENGLISH, "zh": CHINESE, "code": CODE, "emoji": EMOJI, "rtl": RIGHT_TO_LEFT}
MALFORMED = {  # bytes that aren't UTF-8, and what is left of them when each maximal bad part becomes U+FFFD
    b"cut \xe4\xbd": "cut \ufffd",
    b"over\xc0\xaflong": "over\ufffd\ufffdlong",
    b"latin-1 caf\xe9!": "latin-1 caf\ufffd!",
    b"half a pair \xed\xa0\xbd.": "half a pair \ufffd\ufffd\ufffd.",
}
