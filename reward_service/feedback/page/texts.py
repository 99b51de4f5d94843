"""The words of the page, in English and Chinese."""

from __future__ import annotations

from collections.abc import Mapping

from reward_service.feedback.agreement_words import Language
from reward_service.feedback.page import admin_texts

LANGUAGES: Mapping[Language, str] = {"en": "English", "zh": "中文"}

ENGLISH: Mapping[str, str] = {
    "title": "Judging texts",
    "sign_in": "Sign in",
    "sign_in_hint": "Open your invitation link, or paste your access code here.",
    "access_code": "Access code",
    "continue": "Continue",
    "invited": "You are invited to judge texts.",
    "bad_code": "This access code is not valid any more. Ask for a new invitation.",
    "sign_out": "Sign out",
    "signed_in_as": "You are",
    "language": "Language",
    "instructions": "Instructions",
    "consent": "Consent",
    "agree": "I have read this and agree",
    "begin": "Begin",
    "must_agree": "Tick the box to begin.",
    "prompt": "The task",
    "first": "First",
    "second": "Second",
    "answer": "Answer",
    "which_better": "Which one is better?",
    "first_3": "First, by far",
    "first_2": "First, clearly",
    "first_1": "First, slightly",
    "tie": "Equally good",
    "second_1": "Second, slightly",
    "second_2": "Second, clearly",
    "second_3": "Second, by far",
    "both_bad": "Both are bad",
    "rate_it": "How good is it?",
    "rate_hint": "1 is poor, 5 is excellent.",
    "rank_them": "Put them in order, the best first.",
    "rank_hint": "Press the numbers of the texts, the best first; Backspace starts again.",
    "place": "Place",
    "save": "Save",
    "skip": "Skip",
    "flag": "Report a problem",
    "undo": "Undo",
    "reason": "Reason",
    "comment": "Comment (no names or personal data)",
    "cancel": "Cancel",
    "differences": "Show differences",
    "plain": "Hide differences",
    "keys": "Keys",
    "user": "User",
    "assistant": "Assistant",
    "system": "System",
    "done_by_you": "judged by you",
    "left_for_you": "left",
    "pace": "s each",
    "nothing_left": "There is nothing left for you to judge. Thank you!",
    "nothing_hint": "New texts may come later. This page looks again every half minute.",
    "paused": "Judging is paused.",
    "paused_hint": "An administrator has paused it. This page looks again every half minute.",
    "undone": "Taken back: judge this one again.",
    "nothing_to_undo": "There is nothing to take back.",
    "before": "You had answered",
    "my_data": "Download what is stored about me",
    "administration": "Administration",
    "judging": "Judging",
    "error": "This did not work",
    "not_yours": "This item is not yours to judge.",
    "forbidden": "You may not see this.",
    "expired_form": "This page was open for too long. Load it again.",
    "not_found": "There is no such page.",
    "back": "Back",
    "quality": "Quality",
    "diversity": "Diversity",
    "skip_too_hard": "I cannot decide",
    "skip_unfamiliar": "I do not know the subject",
    "skip_too_long": "Too long",
    "skip_other": "Something else",
    "flag_harmful": "Harmful or upsetting",
    "flag_personal_data": "Contains personal data",
    "flag_broken": "Broken or unreadable",
    "flag_wrong_language": "Wrong language",
    "flag_other": "Something else",
    "key_choose": "choose",
    "key_undo": "undo",
    "key_skip": "skip",
    "key_flag": "report a problem",
    "key_differences": "differences",
    "key_rate": "rate the criterion that is marked",
    "key_rank": "give the next place",
    "key_save": "save",
    "key_clear": "start again",
    "skip_to_content": "Skip to the texts",
}

CHINESE: Mapping[str, str] = {
    "title": "文本评判",
    "sign_in": "登录",
    "sign_in_hint": "请打开邀请链接，或在此粘贴访问码。",
    "access_code": "访问码",
    "continue": "继续",
    "invited": "邀请您参与文本评判。",
    "bad_code": "该访问码已失效，请索取新的邀请。",
    "sign_out": "退出",
    "signed_in_as": "您的代号",
    "language": "语言",
    "instructions": "说明",
    "consent": "知情同意",
    "agree": "我已阅读并同意",
    "begin": "开始",
    "must_agree": "请先勾选同意。",
    "prompt": "题目",
    "first": "第一篇",
    "second": "第二篇",
    "answer": "回答",
    "which_better": "哪一篇更好？",
    "first_3": "第一篇好得多",
    "first_2": "第一篇明显更好",
    "first_1": "第一篇略好",
    "tie": "一样好",
    "second_1": "第二篇略好",
    "second_2": "第二篇明显更好",
    "second_3": "第二篇好得多",
    "both_bad": "两篇都差",
    "rate_it": "这篇怎么样？",
    "rate_hint": "1 分很差，5 分极好。",
    "rank_them": "请从好到差排序。",
    "rank_hint": "从最好的开始，依次按下文本的数字键；退格键重新开始。",
    "place": "名次",
    "save": "保存",
    "skip": "跳过",
    "flag": "报告问题",
    "undo": "撤销",
    "reason": "原因",
    "comment": "备注（请勿填写姓名或个人信息）",
    "cancel": "取消",
    "differences": "显示差异",
    "plain": "隐藏差异",
    "keys": "快捷键",
    "user": "用户",
    "assistant": "助手",
    "system": "系统",
    "done_by_you": "已评判",
    "left_for_you": "剩余",
    "pace": "秒/条",
    "nothing_left": "没有需要您评判的内容了，谢谢！",
    "nothing_hint": "稍后可能有新内容，本页每半分钟刷新一次。",
    "paused": "评判已暂停。",
    "paused_hint": "管理员已暂停评判，本页每半分钟刷新一次。",
    "undone": "已撤销，请重新评判这一条。",
    "nothing_to_undo": "没有可撤销的内容。",
    "before": "您之前的回答",
    "my_data": "下载与我有关的数据",
    "administration": "管理",
    "judging": "评判",
    "error": "操作未成功",
    "not_yours": "这一条不属于您。",
    "forbidden": "您无权查看此页。",
    "expired_form": "页面打开时间过长，请重新加载。",
    "not_found": "没有这个页面。",
    "back": "返回",
    "quality": "质量",
    "diversity": "多样性",
    "skip_too_hard": "无法判断",
    "skip_unfamiliar": "不熟悉该主题",
    "skip_too_long": "太长",
    "skip_other": "其他",
    "flag_harmful": "有害或令人不适",
    "flag_personal_data": "含有个人信息",
    "flag_broken": "损坏或无法阅读",
    "flag_wrong_language": "语言不对",
    "flag_other": "其他",
    "key_choose": "选择",
    "key_undo": "撤销",
    "key_skip": "跳过",
    "key_flag": "报告问题",
    "key_differences": "差异",
    "key_rate": "为当前项目打分",
    "key_rank": "给出下一个名次",
    "key_save": "保存",
    "key_clear": "重新开始",
    "skip_to_content": "跳到正文",
}

TEXTS: Mapping[Language, Mapping[str, str]] = {
    "en": {**ENGLISH, **admin_texts.ENGLISH},
    "zh": {**CHINESE, **admin_texts.CHINESE},
}

INSTRUCTIONS: Mapping[Language, str] = {
    "en": """\
You will see a task and texts that were written for it. Say how good they are.

Read the task first, then every text to its end. Judge what is written: is it right, does it do \
what the task asks, is it clear and pleasant to read? Longer is not better in itself, and it does \
not matter which one is shown first.

If two texts are equally good, say so. If none is of any use, say that both are bad. Skip what you \
cannot judge, and report what should not be shown to anybody. You can take back your last answer. \
Some items come a second time, and some have a known answer: that is how we learn how reliable \
judgements are.""",
    "zh": """\
您会看到一个题目，以及为它写的文本。请评判这些文本的好坏。

请先读题目，再把每篇文本读完。请就文论文：内容是否正确，是否完成了题目的要求，是否清楚易读？\
篇幅长不等于好，先后顺序也没有意义。

如果两篇一样好，请直接说明；如果都没有用处，请选“两篇都差”。无法判断的可以跳过，不应展示的请报告。\
您可以撤销上一条回答。有些内容会再次出现，有些已有标准答案：这能帮助我们了解评判的可靠程度。""",
}

CONSENT: Mapping[Language, str] = {
    "en": """\
Your judgements are used to train and to measure language models. They are stored under a random \
name, with the time that you took. Your name, your e-mail address and your IP address are not \
stored. The texts are written by machines and may be wrong or upsetting; you may skip any of them, \
and stop at any time, without giving a reason. You can download what is stored about you here, and \
have it deleted: tell the person who invited you your random name.""",
    "zh": """\
您的评判将用于训练和评测语言模型。评判以随机代号保存，并记录所用时间；\
不保存您的姓名、邮箱或 IP 地址。文本由机器撰写，可能有误或令人不适；\
您可以跳过任何一条，也可以随时停止，无需说明理由。\
您可以在本页下载与您有关的数据，也可以要求删除：请将您的随机代号告知邀请您的人。""",
}
